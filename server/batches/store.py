"""The records of batches and their lines, with the results: one SQLite file.

A line's result and the counts of its batch are one transaction. So after a kill at any moment each
line either has its result or is still to be run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from engine.errors import NotFound
from engine.words import echoed
from server.batches.record import FINAL, Batch, BatchState, Line, LineError, Outcome, Tokens
from server.database import Database
from server.stored_files.record import Viewer

FILE_NAME = "batches.sqlite3"

_TABLES = (
    """
CREATE TABLE batches (
    sequence          INTEGER PRIMARY KEY AUTOINCREMENT,
    id                TEXT NOT NULL UNIQUE,
    owner             TEXT NOT NULL,
    endpoint          TEXT NOT NULL,
    input_file_id     TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata          TEXT NOT NULL,
    state             TEXT NOT NULL,
    created_at        INTEGER NOT NULL,
    expires_at        INTEGER NOT NULL,
    output_expires_s  INTEGER,
    in_progress_at    INTEGER,
    finalizing_at     INTEGER,
    completed_at      INTEGER,
    failed_at         INTEGER,
    expired_at        INTEGER,
    cancelling_at     INTEGER,
    cancelled_at      INTEGER,
    output_file_id    TEXT,
    error_file_id     TEXT,
    errors            TEXT NOT NULL,
    total             INTEGER NOT NULL,
    completed         INTEGER NOT NULL,
    failed            INTEGER NOT NULL,
    input_tokens      INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    output_tokens     INTEGER NOT NULL,
    reasoning_tokens  INTEGER NOT NULL
) STRICT;
CREATE TABLE lines (
    batch       INTEGER NOT NULL,
    number      INTEGER NOT NULL,
    custom_id   TEXT NOT NULL,
    model_group TEXT NOT NULL,
    offset      INTEGER NOT NULL,
    nbytes      INTEGER NOT NULL,
    attempts    INTEGER NOT NULL DEFAULT 0,
    state       INTEGER NOT NULL DEFAULT 0,
    result      BLOB
) STRICT;
CREATE UNIQUE INDEX lines_number ON lines (batch, number);
CREATE INDEX lines_waiting ON lines (batch, model_group) WHERE state = 0;
""",
)

_WAITING, _COMPLETED, _FAILED = range(3)
"""States of a line."""

_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
_FIELDS = (
    "id",
    "owner",
    "endpoint",
    "input_file_id",
    "completion_window",
    "metadata",
    "state",
    "created_at",
    "expires_at",
    "output_expires_s",
    *_TIMES,
    "output_file_id",
    "error_file_id",
    "errors",
    "total",
    "completed",
    "failed",
)
_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
_COLUMNS = ", ".join((*_FIELDS, *_TOKENS))
_LINE = "batch, number, custom_id, model_group, offset, nbytes, attempts"

_READ_AT_ONCE = 64
"""Results. One may have megabytes."""


Listed: TypeAlias = tuple[list[Batch], bool]
"""Batches, and whether there are more."""
Groups: TypeAlias = list[tuple[str, int]]
Lines: TypeAlias = list[Line]
Unfinished: TypeAlias = list[Batch]


class BatchStore:
    """Batches and their lines. Threads may share it, and every method blocks on the disk."""

    def __init__(self, data_dir: Path) -> None:
        """Open or create the file.

        Raises:
            ConfigError: it cannot be used; it is left as it is.

        """
        self._database = Database(data_dir / FILE_NAME, _TABLES)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def insert(self, batch: Batch) -> Batch:
        """Add a record, and return it with its sequence."""
        values = _values(batch)
        with self._database.writing() as connection:
            cursor = connection.execute(
                f"INSERT INTO batches ({_COLUMNS}) VALUES ({', '.join('?' * len(values))})", values
            )
            return replace(batch, sequence=int(cursor.lastrowid or 0))

    def get(self, viewer: Viewer, batch_id: str, *, param: str | None = None) -> Batch:
        """One batch.

        Raises:
            NotFound: there is none that the viewer sees.

        """
        rows = self._database.rows(
            f"SELECT sequence, {_COLUMNS} FROM batches WHERE id = ?", batch_id
        )
        batch = _batch(rows[0]) if rows else None
        if batch is None or not viewer.sees(batch.owner):
            raise NotFound(f"There is no batch {echoed(batch_id)}.", param=param)
        return batch

    def list(self, viewer: Viewer, *, limit: int, after: str | None) -> Listed:
        """Up to `limit` batches, the newest first, and whether there are more.

        Raises:
            NotFound: the viewer sees no batch `after`.

        """
        where, values = ["1"], []  # type: Any, Any
        if not viewer.sees_all:
            where.append("owner = ?")
            values.append(viewer.name)
        if after is not None:
            where.append("sequence < ?")
            values.append(self.get(viewer, after, param="after").sequence)
        rows = self._database.rows(
            f"SELECT sequence, {_COLUMNS} FROM batches WHERE {' AND '.join(where)}"
            " ORDER BY sequence DESC LIMIT ?",
            *values,
            limit + 1,
        )
        return [_batch(row) for row in rows[:limit]], len(rows) > limit

    def unfinished(self) -> Unfinished:
        """The batches that have not ended, oldest first."""
        final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
        rows = self._database.rows(
            f"SELECT sequence, {_COLUMNS} FROM batches WHERE state NOT IN ({final})"
            " ORDER BY sequence"
        )
        return [_batch(row) for row in rows]

    def move(
        self, batch: Batch, state: BatchState, now: int, *, only_from: Collection[BatchState]
    ) -> Batch:
        """Put a batch into another state, if it is in one of `only_from`; return it as it is."""
        froms = ", ".join(f"'{each.value}'" for each in only_from)
        with self._database.writing() as connection:
            connection.execute(
                f"UPDATE batches SET state = ?, {state.value}_at = ? WHERE id = ?"
                f" AND state IN ({froms})",
                (state.value, now, batch.id),
            )
            return self._read(batch.sequence)

    def begin_lines(self, batch: Batch, lines: Iterable[Line], now: int) -> Batch:
        """Add the lines of a batch that is valid, and put it in progress unless it is cancelled."""
        with self._database.writing() as connection:
            now_as = self._read(batch.sequence)
            if now_as.state is not BatchState.VALIDATING:
                return now_as
            connection.executemany(
                "INSERT INTO lines (batch, number, custom_id, model_group, offset, nbytes)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (each.batch, each.number, each.custom_id, each.group, each.offset, each.nbytes)
                    for each in lines
                ),
            )
            connection.execute(
                "UPDATE batches SET state = ?, in_progress_at = ?,"
                " total = (SELECT count(*) FROM lines WHERE batch = sequence)"
                " WHERE sequence = ?",
                (BatchState.IN_PROGRESS.value, now, batch.sequence),
            )
            return self._read(batch.sequence)

    def refuse(self, batch: Batch, errors: Iterable[LineError], now: int) -> Batch:
        """End a batch whose input is wrong."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE batches SET state = ?, failed_at = ?, errors = ?"
                " WHERE sequence = ? AND state = ?",
                (
                    BatchState.FAILED.value,
                    now,
                    json.dumps([asdict(error) for error in errors]),
                    batch.sequence,
                    BatchState.VALIDATING.value,
                ),
            )
            return self._read(batch.sequence)

    def groups(self, batches: Collection[int]) -> Groups:
        """Of the waiting lines of these batches: each group, and its oldest batch."""
        marks = ", ".join("?" * len(batches))
        return [
            (str(group), int(oldest))
            for group, oldest in self._database.rows(
                "SELECT model_group, min(batch) FROM lines"
                f" WHERE state = 0 AND batch IN ({marks}) GROUP BY model_group ORDER BY min(batch)",
                *batches,
            )
        ]

    def waiting(self, group: str, batches: Collection[int]) -> Lines:
        """The waiting lines of a group, in the order of the batches and of the lines."""
        marks = ", ".join("?" * len(batches))
        rows = self._database.rows(
            f"SELECT {_LINE} FROM lines WHERE state = 0 AND model_group = ?"
            f" AND batch IN ({marks}) ORDER BY batch, number",
            group,
            *batches,
        )
        return [Line(*row) for row in rows]

    def begin(self, lines: Iterable[Line]) -> None:
        """Note that lines run. If the process dies now, its successor knows."""
        self._count_attempts(lines, 1)

    def put_back(self, lines: Iterable[Line]) -> None:
        """Note that lines do not run any more and have no result."""
        self._count_attempts(lines, -1)

    def _count_attempts(self, lines: Iterable[Line], by: int) -> None:
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE lines SET attempts = attempts + ? WHERE batch = ? AND number = ?",
                [(by, line.batch, line.number) for line in lines],
            )

    def finish(self, line: Line, outcome: Outcome) -> Batch:
        """Record the result of a line, once; return its batch."""
        tokens = outcome.tokens
        with self._database.writing() as connection:
            cursor = connection.execute(
                "UPDATE lines SET state = ?, result = ? WHERE batch = ? AND number = ?"
                " AND state = 0",
                (
                    _COMPLETED if outcome.ok else _FAILED,
                    outcome.result,
                    line.batch,
                    line.number,
                ),
            )
            if cursor.rowcount:
                count = "completed" if outcome.ok else "failed"
                connection.execute(
                    f"UPDATE batches SET {count} = {count} + 1, input_tokens = input_tokens + ?,"
                    " cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?,"
                    " reasoning_tokens = reasoning_tokens + ? WHERE sequence = ?",
                    (tokens.input, tokens.cached, tokens.output, tokens.reasoning, line.batch),
                )
            return self._read(line.batch)

    def finish_rest(self, batch: Batch, result: Any) -> Batch:
        """Record the same end for all lines that wait; `result` makes it of a line."""
        with self._database.writing() as connection:
            rows = connection.execute(
                f"SELECT {_LINE} FROM lines WHERE batch = ? AND state = 0", (batch.sequence,)
            ).fetchall()
            connection.executemany(
                "UPDATE lines SET state = ?, result = ? WHERE batch = ? AND number = ?",
                [(_FAILED, result(Line(*row)), row[0], row[1]) for row in rows],
            )
            connection.execute(
                "UPDATE batches SET failed = failed + ? WHERE sequence = ?",
                (len(rows), batch.sequence),
            )
            return self._read(batch.sequence)

    def results(self, batch: Batch, *, ok: bool) -> Iterator[bytes]:
        """The results of the lines that completed, or of those that failed, in their order."""
        last = 0
        while True:
            rows = self._database.rows(
                "SELECT number, result FROM lines WHERE batch = ? AND state = ? AND number > ?"
                " ORDER BY number LIMIT ?",
                batch.sequence,
                _COMPLETED if ok else _FAILED,
                last,
                _READ_AT_ONCE,
            )
            if not rows:
                return
            last = rows[-1][0]
            yield b"".join(row[1] for row in rows)

    def end(
        self,
        batch: Batch,
        state: BatchState,
        now: int,
        output_file_id: str | None,
        error_file_id: str | None,
    ) -> Batch:
        """End a batch: its results are in files now."""
        with self._database.writing() as connection:
            connection.execute(
                f"UPDATE batches SET state = ?, {state.value}_at = ?, output_file_id = ?,"
                " error_file_id = ? WHERE sequence = ?",
                (state.value, now, output_file_id, error_file_id, batch.sequence),
            )
            connection.execute("DELETE FROM lines WHERE batch = ?", (batch.sequence,))
            return self._read(batch.sequence)

    def prune(self, before: int) -> None:
        """Forget batches that ended, and were made before that time."""
        final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
        with self._database.writing() as connection:
            connection.execute(
                f"DELETE FROM batches WHERE created_at < ? AND state IN ({final})", (before,)
            )

    def _read(self, sequence: int) -> Batch:
        rows = self._database.rows(
            f"SELECT sequence, {_COLUMNS} FROM batches WHERE sequence = ?", sequence
        )
        return _batch(rows[0])


def _values(batch: Batch) -> tuple[Any, ...]:
    given = {name: getattr(batch, name) for name in _FIELDS}
    given |= {
        "metadata": json.dumps(batch.metadata),
        "state": batch.state.value,
        "errors": json.dumps([asdict(error) for error in batch.errors]),
    }
    tokens = batch.tokens
    return (*given.values(), tokens.input, tokens.cached, tokens.output, tokens.reasoning)


def _batch(row: tuple[Any, ...]) -> Batch:
    sequence, *rest = row
    values = dict(zip(_FIELDS, rest, strict=False))
    values |= {
        "metadata": json.loads(values["metadata"]),
        "state": BatchState(values["state"]),
        "errors": tuple(LineError(**each) for each in json.loads(values["errors"])),
    }
    return Batch(**values, tokens=Tokens(*rest[len(_FIELDS) :]), sequence=sequence)
