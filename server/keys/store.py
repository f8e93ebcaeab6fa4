"""The store of keys: one SQLite file, which commands write beside a running server."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
import stat
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, Conflict, NotFound
from server.keys.record import Key

FILE_NAME = "keys.db"

SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file. A new version adds its step to `_migrate`."""

_BUSY_TIMEOUT_S = 5.0

_MODE = 0o600

_TABLE = """
CREATE TABLE keys (
    name                TEXT PRIMARY KEY,
    digest              BLOB NOT NULL UNIQUE,
    tier                TEXT NOT NULL,
    admin               INTEGER NOT NULL,
    models              TEXT NOT NULL,
    endpoints           TEXT NOT NULL,
    requests_per_minute INTEGER,
    tokens_per_minute   INTEGER,
    concurrent          INTEGER,
    day                 REAL,
    month               REAL,
    when_spent          TEXT NOT NULL,
    created_at          INTEGER NOT NULL,
    last_used_at        INTEGER,
    expires_at          INTEGER,
    revoked_at          INTEGER
) STRICT
"""

_FIELDS = tuple(field.name for field in dataclasses.fields(Key))
_LISTS = frozenset({"models", "endpoints"})


class KeyStore:
    """The keys of one `data_dir`. Every method blocks on the disk.

    What a method writes is on disk when it returns. Several processes may use the file at once,
    and in each one thread at a time.

    Raises:
        ConfigError: the file is damaged, newer than this program, or cannot be used.

    """

    def __init__(self, folder: Path) -> None:
        """Open or create the file."""
        self.path = folder / FILE_NAME
        _create(folder, self.path)
        self._connection: sqlite3.Connection | None = None
        try:
            with self._named(), _alone(folder):
                self._connection = sqlite3.connect(
                    self.path,
                    timeout=_BUSY_TIMEOUT_S,
                    isolation_level=None,
                    check_same_thread=False,
                )
                self._execute("PRAGMA journal_mode = WAL")
                self._execute("PRAGMA synchronous = FULL")
                with self._writing():
                    self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()

    def version(self) -> int:
        """A number that changes with each change by others. It takes microseconds."""
        with self._named():
            (version,) = self._execute("PRAGMA data_version").fetchone()
        return int(version)

    def all(self) -> tuple[Key, ...]:
        """All keys, by age."""
        with self._named():
            rows = self._execute(
                f"SELECT {', '.join(_FIELDS)} FROM keys ORDER BY created_at, name"
            ).fetchall()
            return tuple(map(_key, rows))

    def add(self, key: Key) -> None:
        """Add a key.

        Raises:
            Conflict: there is one of that name.

        """
        with self._named():
            try:
                self._execute(
                    f"INSERT INTO keys ({', '.join(_FIELDS)})"
                    f" VALUES ({', '.join('?' * len(_FIELDS))})",
                    _row(key),
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"There is a key {key.name!r} already.", param="name") from None

    def change(self, name: str, change: Callable[[Key], Key]) -> Key:
        """Replace a key by what `change` makes of it; nobody else changes it meanwhile.

        Raises:
            NotFound: there is none of that name.
            Exception: what `change` raised. Nothing is changed then.

        """
        with self._named(), self._writing():
            row = self._execute(
                f"SELECT {', '.join(_FIELDS)} FROM keys WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                raise _not_found(name)
            key = change(_key(row))
            self._execute(
                f"UPDATE keys SET ({', '.join(_FIELDS)}) = ({', '.join('?' * len(_FIELDS))})"
                " WHERE name = ?",
                (*_row(key), name),
            )
        return key

    def remove(self, name: str) -> None:
        """Forget a key.

        Raises:
            NotFound: there is none of that name.

        """
        with self._named():
            if not self._execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                raise _not_found(name)

    def note_used(self, used: Mapping[bytes, int]) -> None:
        """Note when keys were last used, by their digests. Unknown ones are skipped."""
        with self._named(), self._writing():
            for digest, at in used.items():
                self._execute(
                    "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?)"
                    " WHERE digest = ?",
                    (at, digest),
                )

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(statement, values)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        """A transaction that nobody else can write beside."""
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            self._execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _named(self) -> Generator[None, None, None]:
        """Make an error of SQLite, or of a record, one that names the file."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"engine.data_dir: {self.path} cannot be used: {error}. It was left as it is."
            ) from error

    def _migrate(self) -> None:
        problems = [row[0] for row in self._execute("PRAGMA quick_check(1)").fetchall()]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0].splitlines()[-1])  # the first is a heading
        (version,) = self._execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"engine.data_dir: {self.path} was written by a newer version of this program"
                f" (schema {version}, this one knows {SCHEMA_VERSION})."
            )
        if version == 0:
            self._execute(_TABLE)
            self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def stored_keys(folder: Path) -> tuple[Key, ...]:
    """The keys of a `data_dir`; none if it has no store. Creates nothing.

    Raises:
        ConfigError: the file cannot be used.

    """
    if not (folder / FILE_NAME).exists():
        return ()
    store = KeyStore(folder)
    try:
        return store.all()
    finally:
        store.close()


def _create(folder: Path, path: Path) -> None:
    """Make the file, so that only its owner may ever read it. SQLite's others take its mode."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only where there is none. To close a second descriptor of the file would drop the locks
        # that SQLite has on it in this process.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _MODE)
            try:
                if os.geteuid() == 0:  # a command of root must not lock out the server's user
                    owner = folder.stat()
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
            finally:
                os.close(descriptor)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & ~_MODE:
            path.chmod(mode & _MODE)
    except OSError as error:
        raise ConfigError(f"engine.data_dir: {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Let one process at a time open the file: a change to WAL does not wait for another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _row(key: Key) -> tuple[Any, ...]:
    return tuple(
        json.dumps(getattr(key, name)) if name in _LISTS else getattr(key, name) for name in _FIELDS
    )


def _key(row: tuple[Any, ...]) -> Key:
    values = dict(zip(_FIELDS, row, strict=True))
    for name in _LISTS:
        values[name] = tuple(json.loads(values[name]))
    return Key(**{**values, "admin": bool(values["admin"])})


def _not_found(name: str) -> NotFound:
    return NotFound(f"There is no key {name[:100]!r}.", param="name")
