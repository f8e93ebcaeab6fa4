"""Vectors in one SQLite file, which sqlite-vec searches."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, Conflict, InvalidRequest, NoSpaceLeft
from server.vector_stores.backend import MAX_DIMENSIONS, Loaded, Near, Passage

if TYPE_CHECKING:
    from server.vector_stores.backend import Vectors

FILE_NAME = "vectors.sqlite3"

SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file."""

CHUNK_VECTORS = 256
"""sqlite-vec keeps so many vectors together, also where a store has fewer."""

SPARE = 16
"""Passages beyond those asked for, among which equal ones find their order."""

MAX_FOUND = 4096
"""Of one search: the limit of sqlite-vec."""

PAGE_BYTES = 32_768
"""A chunk is read page by page: with SQLite's 4,096 a search takes half as long again."""

_BUSY_TIMEOUT_S = 5.0

_TABLES = f"""
BEGIN;
CREATE TABLE stores (
    number     INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    dimensions INTEGER NOT NULL
) STRICT;
CREATE TABLE passages (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    store      INTEGER NOT NULL,
    attachment INTEGER NOT NULL,
    ordinal    INTEGER NOT NULL,
    text       TEXT NOT NULL
) STRICT;
CREATE INDEX passages_attachment ON passages (store, attachment, ordinal);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class SqliteBackend:
    """See `Backend`. One connection writes and another reads; threads take them in turn."""

    def __init__(self, folder: Path) -> None:
        """Open or create the file in `folder`.

        Raises:
            ConfigError: it is damaged, newer than this program, or cannot be used.

        """
        self._path = folder / FILE_NAME
        self._writing, self._reading = threading.RLock(), threading.Lock()
        self._connections: list[Any] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite's other files take the mode of this one.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._writer = self._connect()
            self._migrate()
            self._reader = self._connect()
        except ImportError as error:
            raise ConfigError(
                f"vector_stores.url: sqlite needs the packages sqlite-vec and pysqlite3: {error}"
            ) from error
        except Exception as error:  # of this SQLite, whose classes are its own
            self.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"engine.data_dir: {self._path} cannot be used: {error}. It was left as it is."
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._writing, self._reading:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def add(
        self, store: str, attachment: int, texts: Sequence[str], vectors: Vectors
    ) -> Sequence[int]:
        """Keep the passages of a file; their ids. See `Backend.add`."""
        dimensions = vectors.shape[1]
        with self._transaction() as connection:
            number = self._number(connection, store, dimensions)
            ids: list[int] = []
            for ordinal, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
                cursor = connection.execute(
                    "INSERT INTO passages (store, attachment, ordinal, text) VALUES (?, ?, ?, ?)",
                    (number, attachment, ordinal, text),
                )
                ids.append(cursor.lastrowid)
                connection.execute(
                    f"INSERT INTO vectors_{number} (rowid, vector) VALUES (?, ?)",
                    (cursor.lastrowid, vector.tobytes()),
                )
        return ids

    def remove(self, store: str, attachment: int) -> None:
        """Forget the passages of a file, if there are any."""
        with self._transaction() as connection:
            found = self._find(connection, store)
            if found is None:
                return
            number, _ = found
            where = "WHERE store = ? AND attachment = ?"
            connection.execute(
                f"DELETE FROM vectors_{number} WHERE rowid IN (SELECT id FROM passages {where})",
                (number, attachment),
            )
            connection.execute(f"DELETE FROM passages {where}", (number, attachment))

    def drop(self, store: str) -> None:
        """Forget a store, if it is there."""
        with self._transaction() as connection:
            found = self._find(connection, store)
            if found is not None:
                number, _ = found
                connection.execute(f"DROP TABLE vectors_{number}")
                connection.execute("DELETE FROM passages WHERE store = ?", (number,))
                connection.execute("DELETE FROM stores WHERE number = ?", (number,))

    def size(self, store: str) -> tuple[int, int]:
        """The vectors of a store and their dimensions; zeros if there are none."""
        with self._reading:
            found = self._find(self._reader, store)
            if found is None:
                return 0, 0
            number, dimensions = found
            ((count,),) = self._reader.execute(
                "SELECT count(*) FROM passages WHERE store = ?", (number,)
            ).fetchall()
        return int(count), dimensions

    def load(self, store: str) -> Loaded:
        """All vectors of a store, by the ids of their passages."""
        import numpy as np

        with self._reading, self._snapshot() as connection:
            found = self._find(connection, store)
            if found is None:
                empty = np.zeros(0, np.int64)
                return Loaded(empty, empty, np.zeros((0, 0), np.float32))
            number, dimensions = found
            # Each by itself: joined, SQLite would look up every vector.
            rows = connection.execute(
                "SELECT id, attachment FROM passages WHERE store = ? ORDER BY id", (number,)
            ).fetchall()
            vectors = np.empty((len(rows), dimensions), np.float32)
            passages = np.fromiter((row[0] for row in rows), np.int64, len(rows))
            cursor = connection.execute(f"SELECT rowid, vector FROM vectors_{number}")
            for rowid, vector in cursor:
                vectors[np.searchsorted(passages, rowid)] = np.frombuffer(vector, np.float32)
        attachments = np.fromiter((row[1] for row in rows), np.int64, len(rows))
        return Loaded(passages, attachments, vectors)

    def nearest(
        self, store: str, vector: Vectors, most: int, among: Collection[int] | None
    ) -> list[Near]:
        """The passages nearest to a vector, exactly. See `Backend.nearest`.

        The distances of sqlite-vec are right to six digits. So some more are taken from it than
        are asked for, and their scores computed anew.
        """
        import numpy as np

        with self._reading, self._snapshot() as connection:
            known = self._find(connection, store)
            if known is None:
                return []
            number, dimensions = known
            taken = min(most + SPARE, MAX_FOUND)
            if len(vector) != dimensions:
                raise _other_dimensions(store, dimensions, len(vector))
            where, values = "", ()  # type: tuple[str, tuple[Any, ...]]
            if among is not None:
                where = (
                    " AND rowid IN (SELECT id FROM passages WHERE store = ? AND attachment IN"
                    " (SELECT value FROM json_each(?)))"
                )
                values = (number, json.dumps(list(among)))
            rows = connection.execute(
                f"SELECT rowid, vector FROM vectors_{number}"
                f" WHERE vector MATCH ? AND k = ?{where} ORDER BY distance",
                (vector.tobytes(), taken, *values),
            ).fetchall()
            marks = ", ".join("?" * len(rows))
            owners = dict(
                connection.execute(
                    f"SELECT id, attachment FROM passages WHERE id IN ({marks})",
                    [row[0] for row in rows],
                ).fetchall()
            )
        found = [
            Near(rowid, owners[rowid], float(np.frombuffer(kept, np.float32) @ vector))
            for rowid, kept in rows
        ]
        return sorted(found, key=lambda near: (-near.score, near.passage))[:most]

    def read(self, passages: Collection[int]) -> Mapping[int, Passage]:
        """Passages by their ids. One that is gone is missing."""
        marks = ", ".join("?" * len(passages))
        with self._reading:
            rows = self._reader.execute(
                f"SELECT id, attachment, ordinal, text FROM passages WHERE id IN ({marks})",
                list(passages),
            ).fetchall()
        return {row[0]: Passage(*row[1:]) for row in rows}

    def texts(self, store: str, attachment: int) -> list[str]:
        """The passages of a file, in order."""
        with self._reading:
            rows = self._reader.execute(
                "SELECT text FROM passages WHERE store = (SELECT number FROM stores WHERE id = ?)"
                " AND attachment = ? ORDER BY ordinal",
                (store, attachment),
            ).fetchall()
        return [row[0] for row in rows]

    def _number(self, connection: Any, store: str, dimensions: int) -> int:
        """The number of a store, which is made if need be."""
        found = self._find(connection, store)
        if found is not None:
            number, known = found
            if known != dimensions:
                raise _other_dimensions(store, known, dimensions)
            return number
        if dimensions > MAX_DIMENSIONS:
            raise InvalidRequest(
                f"The embedding model gives {dimensions} dimensions; {MAX_DIMENSIONS} can be kept."
            )
        cursor = connection.execute(
            "INSERT INTO stores (id, dimensions) VALUES (?, ?)", (store, dimensions)
        )
        number = int(cursor.lastrowid)
        connection.execute(
            f"CREATE VIRTUAL TABLE vectors_{number} USING vec0"
            f"(vector float[{int(dimensions)}], chunk_size={CHUNK_VECTORS})"
        )
        return number

    @staticmethod
    def _find(connection: Any, store: str) -> tuple[int, int] | None:
        rows = connection.execute(
            "SELECT number, dimensions FROM stores WHERE id = ?", (store,)
        ).fetchall()
        return rows[0] if rows else None

    @contextlib.contextmanager
    def _transaction(self) -> Generator[Any, None, None]:
        with self._writing:
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if (full := NoSpaceLeft.of(error, "the vectors")) is not None:
                    raise full from error
                raise

    @contextlib.contextmanager
    def _snapshot(self) -> Generator[Any, None, None]:
        """The reader, with one state of the file for several queries."""
        self._reader.execute("BEGIN")
        try:
            yield self._reader
        finally:
            self._reader.execute("COMMIT")

    def _connect(self) -> Any:
        # Python's own module may be built without extensions, and often has an old SQLite.
        import sqlite_vec
        from pysqlite3 import dbapi2

        connection = dbapi2.connect(
            str(self._path), timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._connections.append(connection)
        connection.enable_load_extension(True)
        sqlite_vec.load(connection)
        connection.enable_load_extension(False)
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _migrate(self) -> None:
        ((version,),) = self._writer.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"engine.data_dir: {self._path} was written by a newer version of this program"
                f" (schema {version}, this one knows {SCHEMA_VERSION})."
            )
        if version == 0:
            self._writer.executescript(_TABLES)


def _other_dimensions(store: str, known: int, given: int) -> Conflict:
    return Conflict(
        f"The vector store {store} has vectors of {known} dimensions, and its embedding model"
        f" gives {given} now. Make a new vector store."
    )
