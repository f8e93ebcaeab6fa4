"""The files that clients uploaded, and those that were made for them, such as a batch's output.

The bytes of each are a file under `data_dir`, and what is known of it is a record in SQLite. A file
is complete before it has a record, and has no record before its bytes are deleted. So a kill at any
moment leaves bytes without a record at most, which the next start removes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from engine.errors import Conflict, InvalidRequest, NoSpaceLeft, NotFound, Overloaded
from engine.files.atomic import remove_leftovers
from engine.units import format_size
from engine.words import echoed
from server.database import Database
from server.stored_files.record import FileLimits, Purpose, StoredFile, Viewer
from server.stored_files.unfinished import Unfinished

log = logging.getLogger(__name__)

FOLDER = "files"
"""Under `data_dir`. It has the bytes of each file under its id, and of each part of an upload."""

FILE_NAME = "files.sqlite3"
"""The records of files, uploads and parts."""

_TABLES = (
    """
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
""",
)

_COLUMNS = "id, owner, filename, purpose, nbytes, created_at, expires_at"


class FileStore:
    """Stored files. Threads may share it, and every method blocks on the disk."""

    def __init__(
        self,
        data_dir: Path,
        limits: FileLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no disk. `clock` gives Unix seconds."""
        self.limits = limits
        self.clock = clock
        self.folder = data_dir / FOLDER
        self._data_dir = data_dir
        self._database: Database | None = None
        self.on_deleted: list[Callable[[str], None]] = []
        """Called with the id of a file that somebody deleted, on the thread of that call."""

    def open(self) -> None:
        """Open the records, and remove bytes without one.

        Raises:
            ConfigError: the records cannot be used; they are left as they are.

        """
        self._database = Database(self._data_dir / FILE_NAME, _TABLES)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        remove_leftovers(self.folder)
        known = {row[0] for row in self.database.rows("SELECT id FROM files")}
        known |= {row[0] for row in self.database.rows("SELECT id FROM parts")}
        for path in self.folder.iterdir():
            if path.name.startswith(("file-", "part_")) and path.name not in known:
                path.unlink(missing_ok=True)
        self.prune()

    def close(self) -> None:
        """Close the records."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    @property
    def database(self) -> Database:
        """The open records.

        Raises:
            Overloaded: they are not open.

        """
        if self._database is None:
            raise Overloaded("Files are not served at this moment.", retry_after_s=5.0)
        return self._database

    def create(
        self,
        owner: str,
        purpose: Purpose,
        filename: str,
        data: Iterable[bytes],
        *,
        expires_after_s: float | None = None,
        file_id: str | None = None,
        bounded: bool = True,
    ) -> StoredFile:
        """Keep the pieces of `data` as a new file. It is on disk, whole, when this returns.

        A result that is not to be lost is not `bounded`: it may be larger than files and the
        storage may be. `file_id` is that of `id_of`, where a restart must find what was made.

        Raises:
            InvalidRequest: it is too large (status 413).
            NoSpaceLeft: the disk, or what the server or the key may store, is full.

        """
        unfinished = self.begin()
        try:
            for piece in data:
                unfinished.write(piece)
            return self.adopt(
                unfinished,
                owner,
                purpose,
                filename,
                expires_after_s=expires_after_s,
                file_id=file_id,
                bounded=bounded,
            )
        finally:
            unfinished.discard()

    def begin(self) -> Unfinished:
        """A file to write to, for `adopt`."""
        return Unfinished(self.folder)

    def adopt(
        self,
        unfinished: Unfinished,
        owner: str,
        purpose: Purpose,
        filename: str,
        *,
        expires_after_s: float | None = None,
        file_id: str | None = None,
        bounded: bool = True,
        beside: Callable[[sqlite3.Connection, StoredFile], object] | None = None,
    ) -> StoredFile:
        """Make a file that was written a stored one.

        `beside` writes further records in the transaction that makes the record.

        Raises:
            InvalidRequest: it is too large (status 413).
            NoSpaceLeft: the disk, or what the server or the key may store, is full.

        """
        nbytes = unfinished.nbytes
        if bounded:
            self.check_size(nbytes)
        now = self.clock()
        age_s = min(self.limits.max_age_s, math.inf if expires_after_s is None else expires_after_s)
        file = StoredFile(
            id=file_id or f"file-{secrets.token_hex(16)}",
            owner=owner,
            filename=filename,
            purpose=purpose,
            nbytes=nbytes,
            created_at=int(now),
            expires_at=None if age_s == math.inf else int(now + age_s),
        )
        path = self.folder / file.id
        unfinished.finish(path)
        try:
            with self.database.writing() as connection:
                if beside is not None:
                    beside(connection, file)
                if bounded:
                    self.check_room(owner, nbytes)
                connection.execute(
                    f"INSERT INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", _row(file)
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return file

    def check_size(self, nbytes: int) -> None:
        """Return if a file may have so many bytes.

        Raises:
            InvalidRequest: it is too large (status 413).

        """
        most = self.limits.max_file_bytes
        if nbytes > most:
            message = f"The file is larger than {format_size(most)} (server.max_file_bytes)."
            raise InvalidRequest(message, param="file", status=413)

    def check_room(self, owner: str, nbytes: int) -> None:
        """Return if there is room for so many further bytes of this owner.

        Raises:
            NoSpaceLeft: what the server or the key may store is full.

        """
        limits = self.limits
        ((total, own),) = self.database.rows(
            "SELECT coalesce(sum(nbytes), 0), coalesce(sum(nbytes) FILTER (WHERE owner = ?1), 0)"
            " FROM (SELECT owner, nbytes FROM files UNION ALL SELECT uploads.owner, parts.nbytes"
            " FROM parts JOIN uploads ON uploads.id = parts.upload_id)",
            owner,
        )
        if own + nbytes > limits.storage_bytes_per_key:
            raise NoSpaceLeft(
                f"There is no room for the file: {format_size(own)} of your"
                f" {format_size(limits.storage_bytes_per_key)} are used. Delete files.",
                param="file",
            )
        if total + nbytes > limits.storage_bytes:
            raise NoSpaceLeft("The server has no room for further files.", param="file")

    def get(self, viewer: Viewer, file_id: str, *, param: str | None = None) -> StoredFile:
        """One file. `param` is the field that names it.

        Raises:
            NotFound: there is none that the viewer sees, or it has expired.

        """
        rows = self.database.rows(f"SELECT {_COLUMNS} FROM files WHERE id = ?", file_id)
        file = _file(rows[0]) if rows else None
        if file is None or not viewer.sees(file.owner) or self._expired(file):
            raise NotFound(f"There is no file {echoed(file_id)}.", param=param)
        return file

    def has(self, file_id: str) -> bool:
        """Whether there is such a file, of anybody."""
        return bool(self.database.rows("SELECT 1 FROM files WHERE id = ?", file_id))

    def open_file(
        self, viewer: Viewer, file_id: str, *, param: str | None = None
    ) -> tuple[StoredFile, BinaryIO]:
        """One file, and its bytes as a stream that the caller closes.

        Raises:
            NotFound: there is none that the viewer sees, or it has expired.

        """
        file = self.get(viewer, file_id, param=param)
        try:
            return file, self.path(file).open("rb")
        except FileNotFoundError:
            raise NotFound(f"There is no file {echoed(file_id)}.", param=param) from None

    def path(self, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self.folder / file.id

    def list(
        self,
        viewer: Viewer,
        *,
        limit: int = 10_000,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> tuple[list[StoredFile], bool]:
        """Up to `limit` files by age, and whether there are more; `after` is the id before them.

        Raises:
            NotFound: the viewer sees no file `after`.

        """
        where, values = ["(expires_at IS NULL OR expires_at > ?)"], [self.clock()]  # type: list[str], list[Any]
        if not viewer.sees_all:
            where.append("owner = ?")
            values.append(viewer.name)
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            self.get(viewer, after, param="after")
            edge = "(SELECT sequence FROM files WHERE id = ?)"
            where.append(f"sequence {'>' if order == 'asc' else '<'} {edge}")
            values.append(after)
        rows = self.database.rows(
            f"SELECT {_COLUMNS} FROM files WHERE {' AND '.join(where)}"
            f" ORDER BY sequence {order} LIMIT ?",
            *values,
            limit + 1,
        )
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, viewer: Viewer, file_id: str) -> None:
        """Delete a file.

        Raises:
            NotFound: there is none that the viewer sees.
            Conflict: something holds it.

        """
        with self.database.writing() as connection:
            self.get(viewer, file_id)
            held = connection.execute(
                "SELECT holder FROM holds WHERE file_id = ? LIMIT 1", (file_id,)
            ).fetchone()
            if held is not None:
                raise Conflict(f"The file {file_id} is in use by {held[0]}.")
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        (self.folder / file_id).unlink(missing_ok=True)
        for notify in self.on_deleted:
            notify(file_id)

    def hold(self, file_id: str, holder: str) -> None:
        """Keep a file from being deleted, also over restarts, until `holder` releases it.

        `holder` is the id of what uses it, such as a batch. It stands in the refusal.
        """
        with self.database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO holds VALUES (?, ?)", (file_id, holder))

    def release(self, holder: str) -> None:
        """End what `holder` holds."""
        with self.database.writing() as connection:
            connection.execute("DELETE FROM holds WHERE holder = ?", (holder,))

    def holders(self) -> set[str]:
        """Everything that holds a file."""
        return {row[0] for row in self.database.rows("SELECT DISTINCT holder FROM holds")}

    def prune(self) -> None:
        """Delete the files that have expired and are not held, and uploads that were left."""
        now = int(self.clock())
        with self.database.writing() as connection:
            gone = connection.execute(
                "DELETE FROM files WHERE expires_at <= ?"
                " AND id NOT IN (SELECT file_id FROM holds) RETURNING id",
                (now,),
            ).fetchall()
            connection.execute(
                "UPDATE uploads SET state = 'expired' WHERE state = 'pending' AND expires_at <= ?",
                (now,),
            )
            gone += connection.execute(
                "DELETE FROM parts WHERE upload_id IN"
                " (SELECT id FROM uploads WHERE state != 'pending') RETURNING id"
            ).fetchall()
            # Nobody asks for an upload for longer than for a file.
            connection.execute(
                "DELETE FROM uploads WHERE state != 'pending' AND expires_at <= ?",
                (now - 86_400,),
            )
        for (each,) in gone:
            with suppress(OSError):
                (self.folder / each).unlink(missing_ok=True)

    def _expired(self, file: StoredFile) -> bool:
        return file.expires_at is not None and file.expires_at <= self.clock()


def id_of(maker: str, what: str) -> str:
    """The id of the file that `maker`, such as a batch, makes as `what`; always the same."""
    return f"file-{hashlib.sha256(f'{maker}/{what}'.encode()).hexdigest()[:32]}"


def _row(file: StoredFile) -> tuple[Any, ...]:
    return (
        file.id,
        file.owner,
        file.filename,
        file.purpose.value,
        file.nbytes,
        file.created_at,
        file.expires_at,
    )


def _file(row: tuple[Any, ...]) -> StoredFile:
    return StoredFile(
        id=row[0],
        owner=row[1],
        filename=row[2],
        purpose=Purpose(row[3]),
        nbytes=row[4],
        created_at=row[5],
        expires_at=row[6],
    )
