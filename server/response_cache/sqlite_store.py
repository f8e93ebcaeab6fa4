"""Answers in one SQLite file. The least recently used go first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import Conflict, Overloaded
from server.response_cache.entry import Entry
from server.response_cache.store import MAX_ENTRY_BYTES, MAX_PENDING_BYTES, NOTHING, Encode, Kept

log = logging.getLogger(__name__)

FILE_NAME = "response-cache.sqlite3"

APPLICATION_ID = 0x52484331
"""`PRAGMA application_id` of the file. Another program's database is never touched."""

SCHEMA_VERSION = 1
"""`PRAGMA user_version`. A file of another version is emptied."""

ROW_BYTES = 256
"""What an entry takes beside its content: key, times, and its part of the indexes."""

ANSWER_LIMIT_S = 5.0
"""A disk that takes longer to answer turns the cache off."""
CLEAR_LIMIT_S = 60.0

BUSY_LIMIT_S = 2.0
EVICTED_AT_ONCE = 64
USED_AT_ONCE = 1000
"""Hits of different answers that are written together."""
RECOUNT_AFTER = 256
"""Entries after which the sum is counted anew: another process may write to the same file."""
JOURNAL_BYTES = 16 * 2**20

_PASSING = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
"""Errors of a moment: another process writes."""

_TABLE = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS entries;
CREATE TABLE entries (
    key     BLOB PRIMARY KEY,
    stored  REAL NOT NULL,
    used    REAL NOT NULL,
    size    INTEGER NOT NULL,
    content BLOB NOT NULL
) STRICT;
CREATE INDEX entries_used ON entries (used, size);
CREATE INDEX entries_stored ON entries (stored);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

ResultT = TypeVar("ResultT")


class SqliteStore:
    """Keeps entries in a file, within a size and an age.

    One thread writes and one reads, so a read waits for no write. Whatever is wrong with the file
    or the disk turns the store off, with one warning.
    """

    kind = "sqlite"

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        max_age_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`max_bytes` bounds the sum of the entries. `clock` gives Unix seconds."""
        self._path = path
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cache-read")
        self._writing: sqlite3.Connection | None = None
        self._reading: sqlite3.Connection | None = None
        self._kept: Kept = NOTHING
        self._puts = 0
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._used: dict[bytes, float] = {}
        """Hits that are still to be written."""
        self._off_reason: str | None = None

    @property
    def max_entry_bytes(self) -> int:
        """The largest entry that it takes."""
        return min(MAX_ENTRY_BYTES, self._max_bytes)

    @property
    def off_reason(self) -> str | None:
        """Why it keeps nothing any more; None while it works."""
        return self._off_reason

    def kept(self) -> Kept:
        """What the file holds."""
        return self._kept

    async def start(self) -> None:
        """Open the file, and make it if it is not there."""
        await self._run(self._writer, self._open, None)

    async def get(self, key: bytes) -> Entry | None:
        """The entry of a key, if there is one that is whole and not too old."""
        if self._off_reason is not None:
            return None
        return await self._run(self._reader, lambda: self._read(key), None)

    def put(self, key: bytes, nbytes: int, encode: Encode) -> None:
        """Keep an entry, soon."""
        with self._lock:
            if self._off_reason or self._pending_bytes + nbytes > MAX_PENDING_BYTES:
                return
            self._pending_bytes += nbytes
        self._writer.submit(self._put, key, nbytes, encode)

    async def clear(self) -> int:
        """Remove all entries.

        Raises:
            Conflict: the store is off.
            Overloaded: the file is busy, or the disk slow.

        """
        removed = None
        if self._off_reason is None:
            removed = await self._run(self._writer, self._clear, None, CLEAR_LIMIT_S)
        if self._off_reason is not None:
            raise Conflict("The response cache is off; the log says why.")
        if removed is None:
            raise Overloaded("The response cache is busy.", retry_after_s=BUSY_LIMIT_S)
        return removed

    async def close(self) -> None:
        """Write what waits, and close the file."""
        self._writer.submit(self._write_used)
        for executor, connection in (
            (self._writer, self._writing),
            (self._reader, self._reading),
        ):
            if connection is not None and self._off_reason is None:
                await self._run(executor, connection.close, None)
            executor.shutdown(wait=False, cancel_futures=self._off_reason is not None)

    async def _run(
        self,
        executor: ThreadPoolExecutor,
        work: Callable[[], ResultT],
        default: ResultT,
        limit_s: float = ANSWER_LIMIT_S,
    ) -> ResultT:
        """What `work` returns. After an error, or on a disk that does not answer, `default`."""

        def guarded() -> ResultT:
            with self._guarded():
                return work()
            return default

        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(executor, guarded)
        except TimeoutError:
            if limit_s == ANSWER_LIMIT_S:
                self._turn_off(f"the disk has not answered for {limit_s:g} s")
            return default

    # On the two threads.

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _PASSING:
                log.debug("%s: %s", self._path, error)
            else:
                self._turn_off(str(error))

    def _turn_off(self, reason: str) -> None:
        with self._lock:
            if self._off_reason is not None:
                return
            self._off_reason = reason
            self._kept = NOTHING
        log.warning("the response cache %s is off until the next start: %s", self._path, reason)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Answers are as private as their requests.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = self._connect()
        try:
            application_id = _value(connection, "PRAGMA application_id")
            if application_id != APPLICATION_ID:
                if application_id or _value(connection, "SELECT count(*) FROM sqlite_schema"):
                    raise sqlite3.DatabaseError("it is another program's database")
                # Before the first page is written; otherwise the file never gets smaller.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            if application_id != APPLICATION_ID or (
                _value(connection, "PRAGMA user_version") != SCHEMA_VERSION
            ):
                connection.executescript(_TABLE)
            connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
            # A process that is killed loses nothing by it, and a machine the last answers.
            connection.execute("PRAGMA synchronous = NORMAL")
            self._writing = connection
            self._reading = self._connect()
        except BaseException:
            self._writing = None
            connection.close()
            raise
        with self._transaction(connection):
            self._count(connection)
            self._make_room(connection, self._max_bytes)
        _release_pages(connection)
        kept = self._kept
        log.info("%d answers (%d bytes) are in %s", kept.entries, kept.nbytes, self._path)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=BUSY_LIMIT_S, isolation_level=None, check_same_thread=False
        )

    def _read(self, key: bytes) -> Entry | None:
        if self._reading is None:
            return None
        row = self._reading.execute(
            "SELECT stored, content FROM entries WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        stored, content = row
        now = self._clock()
        if stored + self._max_age_s <= now:
            return None
        entry = Entry.decode(key, content)
        if entry is None:
            log.warning("an answer in %s is damaged; it is removed", self._path)
            self._writer.submit(self._remove, key, content)
            return None
        with self._lock:
            self._used[key] = now
            # Before an answer is evicted they are written in any case.
            if len(self._used) == USED_AT_ONCE:
                self._writer.submit(self._write_used)
        return entry

    def _put(self, key: bytes, nbytes: int, encode: Encode) -> None:
        try:
            if self._writing is None or self._off_reason is not None:
                return
            content = encode()
            if content is None or len(content) + ROW_BYTES > self._max_bytes:
                return
            size, now = len(content) + ROW_BYTES, self._clock()
            with self._guarded(), self._transaction(self._writing):
                self._note_used(self._writing)
                self._puts += 1
                if self._puts % RECOUNT_AFTER == 0:
                    self._count(self._writing)
                replaced = self._writing.execute(
                    "DELETE FROM entries WHERE key = ? RETURNING size", (key,)
                ).fetchall()
                self._add(-len(replaced), -sum(size for (size,) in replaced))
                self._make_room(self._writing, self._max_bytes - size)
                self._writing.execute(
                    "INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (key, now, now, size, content)
                )
                self._add(1, size)
        except Exception:
            log.exception("an answer could not be kept")
        finally:
            with self._lock:
                self._pending_bytes -= nbytes

    def _remove(self, key: bytes, content: bytes) -> None:
        with self._guarded():
            if self._writing is not None:
                # Unless it has been replaced meanwhile.
                self._writing.execute(
                    "DELETE FROM entries WHERE key = ? AND content = ?", (key, content)
                )
                self._count(self._writing)

    def _write_used(self) -> None:
        with self._guarded():
            if self._writing is not None:
                with self._transaction(self._writing):
                    self._note_used(self._writing)

    def _note_used(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            used, self._used = self._used, {}
        connection.executemany(
            "UPDATE entries SET used = ? WHERE key = ?", [(at, key) for key, at in used.items()]
        )

    def _clear(self) -> int | None:
        if self._writing is None:
            return None
        removed = self._writing.execute("DELETE FROM entries").rowcount
        _release_pages(self._writing)
        self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._count(self._writing)
        return removed

    def _make_room(self, connection: sqlite3.Connection, max_bytes: int) -> None:
        """Remove what is too old, and then the least recently used, down to `max_bytes`."""
        expired = self._clock() - self._max_age_s
        if connection.execute("DELETE FROM entries WHERE stored <= ?", (expired,)).rowcount:
            self._count(connection)
        while self._kept.nbytes > max_bytes:
            oldest = connection.execute(
                "SELECT rowid, size FROM entries ORDER BY used LIMIT ?", (EVICTED_AT_ONCE,)
            ).fetchall()
            if not oldest:
                self._count(connection)
                return
            for rowid, size in oldest:
                connection.execute("DELETE FROM entries WHERE rowid = ?", (rowid,))
                self._add(-1, -size)
                if self._kept.nbytes <= max_bytes:
                    break

    def _add(self, entries: int, nbytes: int) -> None:
        self._kept = Kept(self._kept.entries + entries, self._kept.nbytes + nbytes)

    def _count(self, connection: sqlite3.Connection) -> None:
        entries, nbytes = connection.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM entries INDEXED BY entries_used"
        ).fetchone()
        self._kept = Kept(entries, nbytes)

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        before = self._kept
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            self._kept = before
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise


def _value(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def _release_pages(connection: sqlite3.Connection) -> None:
    """Give free pages back to the disk."""
    # Not `execute`: the pragma frees one page with each step, and that takes one step only.
    connection.executescript("PRAGMA incremental_vacuum")
