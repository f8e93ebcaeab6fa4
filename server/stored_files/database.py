"""The records of files, uploads and parts: one SQLite file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, NoSpaceLeft

FILE_NAME = "files.sqlite3"

SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file. A new version adds its step to `_migrate`."""

_BUSY_TIMEOUT_S = 5.0

_TABLES = f"""
BEGIN;
CREATE TABLE files (
    sequence   INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    owner      TEXT NOT NULL,
    filename   TEXT NOT NULL,
    purpose    TEXT NOT NULL,
    nbytes     INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
) STRICT;
CREATE INDEX files_owner ON files (owner, sequence);
CREATE TABLE holds (
    file_id TEXT NOT NULL,
    holder  TEXT NOT NULL,
    PRIMARY KEY (file_id, holder)
) STRICT, WITHOUT ROWID;
CREATE TABLE uploads (
    id           TEXT PRIMARY KEY,
    owner        TEXT NOT NULL,
    filename     TEXT NOT NULL,
    purpose      TEXT NOT NULL,
    mime_type    TEXT NOT NULL,
    nbytes       INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    state        TEXT NOT NULL,
    file_id      TEXT,
    file_expires INTEGER
) STRICT;
CREATE TABLE parts (
    id         TEXT PRIMARY KEY,
    upload_id  TEXT NOT NULL,
    nbytes     INTEGER NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX parts_upload ON parts (upload_id);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class Database:
    """One connection that threads take in turn. Every method blocks on the disk.

    What a transaction writes is on disk when it ends.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the file in `folder`.

        Raises:
            ConfigError: it is damaged, newer than this program, or cannot be used. It is left as
                it is.

        """
        path = folder / FILE_NAME
        self._lock = threading.RLock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite's other files take the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"engine.data_dir: {path}: {error}") from error
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise ConfigError(
                    f"engine.data_dir: {path} cannot be used: {error}. It was left as it is."
                ) from error
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def writing(self) -> Generator[sqlite3.Connection, None, None]:
        """A transaction that no other thread comes between.

        Raises:
            NoSpaceLeft: the disk is full.

        """
        with self._lock:
            connection = self._connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if (full := NoSpaceLeft.of(error, "the file")) is not None:
                    raise full from error
                raise

    def _migrate(self, path: Path) -> None:
        problems = [row[0] for row in self.rows("PRAGMA quick_check(1)")]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0].splitlines()[-1])  # the first is a heading
        ((version,),) = self.rows("PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"engine.data_dir: {path} was written by a newer version of this program"
                f" (schema {version}, this one knows {SCHEMA_VERSION})."
            )
        if version == 0:
            self._connection.executescript(_TABLES)
