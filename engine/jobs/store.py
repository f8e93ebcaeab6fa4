"""The store of jobs: one SQLite file."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeAlias

from engine.errors import ConfigError, NotFound
from engine.requests import Priority
from engine.words import echoed

FILE_NAME = "jobs.sqlite3"

SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file. A new version adds its step to `_migrate`."""

DURATIONS = 20
"""How many completed jobs of a model its mean duration is taken from."""

_BUSY_TIMEOUT_S = 5.0

_TABLE = """
BEGIN;
CREATE TABLE jobs (
    sequence      INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    model         TEXT NOT NULL,
    request       TEXT NOT NULL,
    priority      INTEGER NOT NULL,
    state         TEXT NOT NULL,
    progress      REAL NOT NULL,
    created_at    INTEGER NOT NULL,
    started_at    INTEGER,
    completed_at  INTEGER,
    expires_at    INTEGER,
    error_code    TEXT,
    error_message TEXT,
    attempts      INTEGER NOT NULL,
    run_s         REAL
) STRICT;
CREATE INDEX jobs_unfinished ON jobs (sequence) WHERE state IN ('queued', 'in_progress');
CREATE INDEX jobs_durations ON jobs (model, sequence) WHERE state = 'completed';
PRAGMA user_version = 1;
COMMIT;
"""

_COLUMNS = (
    "id, model, request, priority, state, progress, created_at, started_at, completed_at, "
    "expires_at, error_code, error_message, attempts, run_s"
)


Rows: TypeAlias = list[tuple[Any, ...]]


class JobState(StrEnum):
    """Where a job is; the last three are final."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self not in (JobState.QUEUED, JobState.IN_PROGRESS)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: the code and message of the engine's error."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job as it is now. Times are unix seconds."""

    id: str
    """`video_` and 32 hexadecimal digits."""
    model: str
    """The id of the model, also where the request named an alias."""
    request: dict[str, Any]
    """The request as JSON, with the model's defaults filled in (`request_codec.py`). `image` is
    whether one was given. Once the job is completed, sizes, frames, fps and seed are those of the
    file, and `cut` has the texts that were too long."""
    priority: Priority
    state: JobState
    progress: float
    """0 to 1."""
    created_at: int
    started_at: int | None = None
    """When the current or last attempt was handed to the engine."""
    completed_at: int | None = None
    """When it ended: completed, failed or cancelled."""
    expires_at: int | None = None
    """When its files are removed, or were; None without files or without a limit on their age."""
    error: JobError | None = None
    attempts: int = 0
    """How many attempts began."""
    run_s: float | None = None
    """Seconds of the completed run, without waiting for a turn or for the model."""


class JobStore:
    """The records of all jobs. Every method blocks on the disk.

    What a method writes is on disk when it returns. Writing methods may be called from one thread
    at a time, reading ones (`get`, `list`, `mean_run_s`) from any. Each side has its own
    connection, and in WAL mode a reader never waits for a writer.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the file in `folder`, and lock it against other processes.

        Raises:
            ConfigError: the file is damaged, newer than this program, in use by another process,
                or the folder cannot be written. The file is left as it is.

        """
        path = folder / FILE_NAME
        self._reading = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "jobs.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"engine.data_dir: {folder}: {error.strerror or error}") from error
        connections: list[sqlite3.Connection] = []
        try:
            # Two processes would run every job twice. The lock ends with the process, also by a
            # kill.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._writer = _connect(path, connections)
            _migrate(self._writer, path)
            self._reader = _connect(path, connections)
        except BaseException as error:
            for connection in connections:
                connection.close()
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise ConfigError(
                    f"engine.data_dir: another process, such as a second server, uses {folder}."
                    " Give one of them a folder of its own: engine.data_dir in the configuration,"
                    " or the variable ROUNDHOUSE_DATA_DIR"
                ) from error
            if isinstance(error, (OSError, sqlite3.Error)):
                raise ConfigError(
                    f"engine.data_dir: {path} cannot be used: {error}. It was left as it is:"
                    " repair it, put a backup in its place, or move it away to start without its"
                    " jobs."
                ) from error
            raise

    def close(self) -> None:
        """Close the file and unlock it."""
        with self._reading:
            self._reader.close()
        self._writer.close()
        os.close(self._lock)

    def insert(self, job: Job) -> None:
        """Add a record."""
        row = _row(job)
        marks = ", ".join("?" * len(row))
        self._writer.execute(f"INSERT INTO jobs ({_COLUMNS}) VALUES ({marks})", row)

    def update(self, job: Job) -> None:
        """Replace the record of the job, if it still has one."""
        self._writer.execute(
            f"UPDATE jobs SET ({_COLUMNS}) = ({', '.join('?' * len(_row(job)))}) WHERE id = ?",
            (*_row(job), job.id),
        )

    def delete(self, job_id: str) -> None:
        """Remove the record, if there is one."""
        self._writer.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def expire(self, job_ids: Iterable[str], now: int) -> None:
        """Note that the files of these jobs are gone. Unknown ids are skipped."""
        self._writer.executemany(
            "UPDATE jobs SET expires_at = ? WHERE id = ? AND state = 'completed'"
            " AND (expires_at IS NULL OR expires_at > ?)",
            [(now, job_id, now) for job_id in job_ids],
        )

    def unfinished(self) -> list[Job]:
        """The jobs that have not ended, oldest first. For the writing thread."""
        rows = self._writer.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('queued', 'in_progress')"
            " ORDER BY sequence"
        ).fetchall()
        return [_job(row) for row in rows]

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFound: there is none.

        """
        rows = self._read(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,))
        if not rows:
            raise NotFound(f"There is no job {echoed(job_id)}.")
        return _job(rows[0])

    def list(
        self, *, limit: int, after: str | None, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs by age, and whether there are more; `after` is the id before them.

        Raises:
            NotFound: there is no job `after`.

        """
        ascending = order == "asc"
        where, values = "", ()  # type: tuple[str, tuple[int, ...]]
        if after is not None:
            edge = self._read("SELECT sequence FROM jobs WHERE id = ?", (after,))
            if not edge:
                raise NotFound(f"There is no job {echoed(after)}.", param="after")
            where, values = f"WHERE sequence {'>' if ascending else '<'} ?", edge[0]
        rows = self._read(
            f"SELECT {_COLUMNS} FROM jobs {where}"
            f" ORDER BY sequence {'ASC' if ascending else 'DESC'} LIMIT ?",
            (*values, limit + 1),
        )
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def mean_run_s(self, model: str) -> float | None:
        """The mean `run_s` of the model's last completed jobs; None when there is none."""
        rows = self._read(
            "SELECT avg(run_s) FROM (SELECT run_s FROM jobs WHERE model = ?"
            " AND state = 'completed' ORDER BY sequence DESC LIMIT ?)",
            (model, DURATIONS),
        )
        mean: float | None = rows[0][0]
        return mean

    def _read(self, query: str, values: tuple[Any, ...]) -> Rows:
        with self._reading:  # several threads read; each holds it for microseconds
            return self._reader.execute(query, values).fetchall()


def _connect(path: Path, connections: list[sqlite3.Connection]) -> sqlite3.Connection:
    # Prompts are nobody else's. SQLite's other files take the mode of this one.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    # Each connection is used by one thread at a time, though opened and closed on another.
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connections.append(connection)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    problems = [row[0] for row in connection.execute("PRAGMA quick_check(1)").fetchall()]
    if problems != ["ok"]:
        raise sqlite3.DatabaseError(problems[0].splitlines()[-1])  # the first is a heading
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"engine.data_dir: {path} was written by a newer version of this program"
            f" (schema {version}, this one knows {SCHEMA_VERSION})."
        )
    if version == 0:
        connection.executescript(_TABLE)


def _row(job: Job) -> tuple[Any, ...]:
    return (
        job.id,
        job.model,
        json.dumps(job.request),
        int(job.priority),
        job.state.value,
        job.progress,
        job.created_at,
        job.started_at,
        job.completed_at,
        job.expires_at,
        job.error.code if job.error else None,
        job.error.message if job.error else None,
        job.attempts,
        job.run_s,
    )


def _job(row: tuple[Any, ...]) -> Job:
    return Job(
        id=row[0],
        model=row[1],
        request=json.loads(row[2]),
        priority=Priority(row[3]),
        state=JobState(row[4]),
        progress=row[5],
        created_at=row[6],
        started_at=row[7],
        completed_at=row[8],
        expires_at=row[9],
        error=None if row[10] is None else JobError(row[10], row[11]),
        attempts=row[12],
        run_s=row[13],
    )
