"""Uploads: a large file that comes in parts."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from engine.errors import Conflict, InvalidRequest, NotFound
from engine.words import echoed
from server.stored_files.record import Purpose, StoredFile, Viewer
from server.stored_files.store import FileStore
from server.stored_files.unfinished import Unfinished

UPLOAD_AGE_S = 3600
"""How long an upload may take."""

MAX_PART_BYTES = 64 * 2**20
"""OpenAI's limit."""

MAX_PARTS = 10_000

_COPIED_BYTES = 2**20

_COLUMNS = (
    "id, owner, filename, purpose, mime_type, nbytes, created_at, expires_at, state, file_id,"
    " file_expires"
)


class UploadState(StrEnum):
    """Where an upload is; the last three are final."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that comes in parts. Times are Unix seconds."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    mime_type: str
    nbytes: int
    """Of the whole file, as the client announced it."""
    created_at: int
    expires_at: int
    state: UploadState = UploadState.PENDING
    file_id: str | None = None
    """Of the file, once it is completed."""
    file_expires_s: int | None = None
    """How long the file is kept; None takes the server's own limit."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload."""

    id: str
    upload_id: str
    created_at: int


class Uploads:
    """The uploads beside a store of files. Every method blocks on the disk."""

    def __init__(self, files: FileStore) -> None:
        self.files = files

    def create(
        self,
        owner: str,
        purpose: Purpose,
        filename: str,
        mime_type: str,
        nbytes: int,
        file_expires_s: int | None = None,
    ) -> Upload:
        """Begin one.

        Raises:
            InvalidRequest: the file would be too large (status 413).
            NoSpaceLeft: there is no room for it.

        """
        self.files.check_size(nbytes)
        self.files.check_room(owner, nbytes)
        now = int(self.files.clock())
        upload = Upload(
            id=f"upload_{secrets.token_hex(16)}",
            owner=owner,
            filename=filename,
            purpose=purpose,
            mime_type=mime_type,
            nbytes=nbytes,
            created_at=now,
            expires_at=now + UPLOAD_AGE_S,
            file_expires_s=file_expires_s,
        )
        with self.files.database.writing() as connection:
            connection.execute(
                f"INSERT INTO uploads ({_COLUMNS}) VALUES ({', '.join('?' * 11)})", _row(upload)
            )
        return upload

    def get(self, viewer: Viewer, upload_id: str) -> Upload:
        """One upload.

        Raises:
            NotFound: there is none that the viewer sees.

        """
        rows = self.files.database.rows(f"SELECT {_COLUMNS} FROM uploads WHERE id = ?", upload_id)
        upload = _upload(rows[0]) if rows else None
        if upload is None or not viewer.sees(upload.owner):
            raise NotFound(f"There is no upload {echoed(upload_id)}.")
        if upload.state is UploadState.PENDING and upload.expires_at <= self.files.clock():
            return replace(upload, state=UploadState.EXPIRED)
        return upload

    def add_part(self, viewer: Viewer, upload_id: str, data: Unfinished) -> Part:
        """Add a part. Parts may come in any order, and side by side.

        Raises:
            NotFound: there is no such upload that the viewer sees.
            Conflict: the upload has ended.
            InvalidRequest: the upload would be larger than announced.
            NoSpaceLeft: there is no room for it.

        """
        nbytes = data.nbytes
        part = Part(f"part_{secrets.token_hex(16)}", upload_id, int(self.files.clock()))
        path = self.files.folder / part.id
        self._pending(viewer, upload_id)
        data.finish(path)
        try:
            with self.files.database.writing() as connection:
                upload = self._pending(viewer, upload_id)
                self.files.check_room(upload.owner, nbytes)
                ((count, so_far),) = connection.execute(
                    "SELECT count(*), coalesce(sum(nbytes), 0) FROM parts WHERE upload_id = ?",
                    (upload_id,),
                ).fetchall()
                if so_far + nbytes > upload.nbytes:
                    raise InvalidRequest(
                        f"The parts have more than the {upload.nbytes} bytes that were announced.",
                        param="data",
                    )
                if count >= MAX_PARTS:
                    raise InvalidRequest(f"An upload has {MAX_PARTS} parts at most.", param="data")
                connection.execute(
                    "INSERT INTO parts (id, upload_id, nbytes, created_at) VALUES (?, ?, ?, ?)",
                    (part.id, upload_id, nbytes, part.created_at),
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return part

    def complete(
        self, viewer: Viewer, upload_id: str, part_ids: Sequence[str], md5: str | None
    ) -> tuple[Upload, StoredFile]:
        """Make the file from the parts, in this order.

        Raises:
            NotFound: there is no such upload that the viewer sees.
            Conflict: the upload has ended.
            InvalidRequest: a part is not of this upload or is named twice, the size is not what
                was announced, or the checksum differs.

        """
        upload = self._pending(viewer, upload_id)
        rows = self.files.database.rows("SELECT id FROM parts WHERE upload_id = ?", upload_id)
        known = {row[0] for row in rows}
        for index, each in enumerate(part_ids):
            if each not in known:
                known_once = each in part_ids[:index]
                message = (
                    f"The part {echoed(each)} is named twice."
                    if known_once
                    else f"The upload has no part {echoed(each)}."
                )
                raise InvalidRequest(message, param=f"part_ids[{index}]")
            known.discard(each)
        unfinished = self.files.begin()
        try:
            digest = hashlib.md5(usedforsecurity=False)
            for each in part_ids:
                with (self.files.folder / each).open("rb") as part:
                    while piece := part.read(_COPIED_BYTES):
                        digest.update(piece)
                        unfinished.write(piece)
            if unfinished.nbytes != upload.nbytes:
                given = f"{unfinished.nbytes} bytes, and {upload.nbytes} were announced"
                raise InvalidRequest(f"The parts have {given}.", param="part_ids")
            if md5 is not None and md5.lower() != digest.hexdigest():
                raise InvalidRequest("The checksum of the file is another.", param="md5")

            def finish(connection: sqlite3.Connection, file: StoredFile) -> None:
                self._pending(viewer, upload_id)
                connection.execute(
                    "UPDATE uploads SET state = ?, file_id = ? WHERE id = ?",
                    (UploadState.COMPLETED.value, file.id, upload_id),
                )
                connection.execute("DELETE FROM parts WHERE upload_id = ?", (upload_id,))

            file = self.files.adopt(
                unfinished,
                upload.owner,
                upload.purpose,
                upload.filename,
                expires_after_s=upload.file_expires_s,
                beside=finish,
            )
        except FileNotFoundError as error:  # it was cancelled meanwhile
            raise _ended(upload_id, "ended") from error
        finally:
            unfinished.discard()
        self._remove(row[0] for row in rows)
        return replace(upload, state=UploadState.COMPLETED, file_id=file.id), file

    def cancel(self, viewer: Viewer, upload_id: str) -> Upload:
        """End an upload without a file.

        Raises:
            NotFound: there is no such upload that the viewer sees.
            Conflict: the upload has ended.

        """
        with self.files.database.writing() as connection:
            upload = self._pending(viewer, upload_id)
            connection.execute(
                "UPDATE uploads SET state = ? WHERE id = ?",
                (UploadState.CANCELLED.value, upload_id),
            )
            rows = connection.execute(
                "DELETE FROM parts WHERE upload_id = ? RETURNING id", (upload_id,)
            ).fetchall()
        self._remove(row[0] for row in rows)
        return replace(upload, state=UploadState.CANCELLED)

    def _remove(self, part_ids: Any) -> None:
        for each in part_ids:
            (self.files.folder / each).unlink(missing_ok=True)

    def _pending(self, viewer: Viewer, upload_id: str) -> Upload:
        upload = self.get(viewer, upload_id)
        if upload.state is not UploadState.PENDING:
            raise _ended(upload_id, upload.state.value)
        return upload


def _ended(upload_id: str, state: str) -> Conflict:
    return Conflict(f"The upload {upload_id} is {state}.")


def _row(upload: Upload) -> tuple[Any, ...]:
    return (
        upload.id,
        upload.owner,
        upload.filename,
        upload.purpose.value,
        upload.mime_type,
        upload.nbytes,
        upload.created_at,
        upload.expires_at,
        upload.state.value,
        upload.file_id,
        upload.file_expires_s,
    )


def _upload(row: tuple[Any, ...]) -> Upload:
    return Upload(
        id=row[0],
        owner=row[1],
        filename=row[2],
        purpose=Purpose(row[3]),
        mime_type=row[4],
        nbytes=row[5],
        created_at=row[6],
        expires_at=row[7],
        state=UploadState(row[8]),
        file_id=row[9],
        file_expires_s=row[10],
    )
