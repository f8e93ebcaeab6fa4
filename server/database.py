"""One SQLite file of records under `data_dir`."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, NoSpaceLeft

_BUSY_TIMEOUT_S = 5.0


class Database:
    """One connection that threads take in turn. Every method blocks on the disk.

    What a transaction writes is on disk when it ends.
    """

    def __init__(self, path: Path, tables: Sequence[str], what: str = "the record") -> None:
        """Open or create the file.

        `tables` are the statements that make it from nothing, and then those of each further
        version. So their number is the version, `PRAGMA user_version` of the file. `what` has no
        room on a full disk.

        Raises:
            ConfigError: it is damaged, newer than this program, or cannot be used. It is left as
                it is.

        """
        self._lock = threading.RLock()
        self._what = what
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
            self._migrate(path, tables)
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
        with self.reading() as connection:
            return connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def reading(self) -> Generator[sqlite3.Connection, None, None]:
        """The connection, for several queries that no other thread comes between."""
        with self._lock:
            yield self._connection

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
                if (full := NoSpaceLeft.of(error, self._what)) is not None:
                    raise full from error
                raise

    def _migrate(self, path: Path, tables: Sequence[str]) -> None:
        problems = [row[0] for row in self.rows("PRAGMA quick_check(1)")]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0].splitlines()[-1])  # the first is a heading
        ((version,),) = self.rows("PRAGMA user_version")
        if version > len(tables):
            raise ConfigError(
                f"engine.data_dir: {path} was written by a newer version of this program"
                f" (schema {version}, this one knows {len(tables)})."
            )
        for number, statements in enumerate(tables[version:], start=version + 1):
            self._connection.executescript(
                f"BEGIN; {statements}; PRAGMA user_version = {number}; COMMIT;"
            )
