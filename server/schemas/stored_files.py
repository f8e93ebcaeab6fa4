"""OpenAI's Files and Uploads APIs: requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from server.schemas.fields import FILE_MARK, Body, single
from server.stored_files.record import StoredFile
from server.stored_files.uploads import MAX_PARTS, Part, Upload

GivenPurpose: TypeAlias = Literal[
    "assistants", "batch", "fine-tune", "vision", "user_data", "evals"
]
AnyPurpose: TypeAlias = Literal[
    "assistants",
    "batch",
    "fine-tune",
    "vision",
    "user_data",
    "evals",
    "assistants_output",
    "batch_output",
    "fine-tune-results",
]

MAX_NAME_CHARS = 512

_SECONDS = (3600, 2_592_000)
_ANCHOR = "created_at"
_EXPIRY_RULE = "it is {anchor: created_at, seconds: N}, with N from 3600 to 2592000"


def _read_expiry(value: Any) -> int:
    if not isinstance(value, dict) or value.keys() != {"anchor", "seconds"}:
        raise ValueError(_EXPIRY_RULE)
    seconds = value["seconds"]
    if isinstance(seconds, str) and seconds.isdecimal() and len(seconds) < 10:  # of a form
        seconds = int(seconds)
    whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if value["anchor"] != _ANCHOR or not whole or not _SECONDS[0] <= seconds <= _SECONDS[1]:
        raise ValueError(_EXPIRY_RULE)
    return int(seconds)


def _read_file(value: Any) -> bytes:
    value = single(value)
    if not isinstance(value, bytes):
        raise ValueError("it is one uploaded file of a multipart form")
    return value


def _read_md5(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 32 or not set(value.lower()) <= _HEX:
        raise ValueError("it is 32 hexadecimal digits")
    return value


_HEX = frozenset("0123456789abcdef")

ExpiresAfter: TypeAlias = Annotated[
    int,
    PlainValidator(_read_expiry),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "anchor": {"const": _ANCHOR},
                "seconds": {"type": "integer", "minimum": _SECONDS[0], "maximum": _SECONDS[1]},
            },
            "required": ["anchor", "seconds"],
            "additionalProperties": False,
        }
    ),
]
"""Seconds after the creation."""

UploadedFile: TypeAlias = Annotated[
    bytes, PlainValidator(_read_file), WithJsonSchema({"type": "string", FILE_MARK: True})
]
"""A file that is on disk already: here it has no bytes."""

FileName: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


def read_count(value: Any) -> Any:
    """The number that a text of a query writes."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value


class FileBody(Body):
    """`POST /v1/files`."""

    file: UploadedFile
    purpose: GivenPurpose
    expires_after: ExpiresAfter | None = None


class FileListQuery(Body):
    """The query of `GET /v1/files`."""

    purpose: AnyPurpose | None = None
    limit: Annotated[int, BeforeValidator(read_count), Field(ge=1, le=10_000)] = 10_000
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class UploadBody(Body):
    """`POST /v1/uploads`."""

    filename: FileName
    purpose: GivenPurpose
    bytes: int = Field(ge=0)
    mime_type: str = Field(max_length=256)
    expires_after: ExpiresAfter | None = None


class PartBody(Body):
    """`POST /v1/uploads/{id}/parts`."""

    data: UploadedFile


class CompleteBody(Body):
    """`POST /v1/uploads/{id}/complete`."""

    part_ids: list[str] = Field(max_length=MAX_PARTS)
    md5: Annotated[
        str | None,
        PlainValidator(_read_md5),
        WithJsonSchema({"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}),
    ] = None
    """The checksum of the whole file."""


def file_document(file: StoredFile) -> dict[str, Any]:
    """OpenAI's file object. A file that does not expire has no `expires_at`."""
    document = {
        "id": file.id,
        "object": "file",
        "bytes": file.nbytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose.value,
        "status": "processed",
    }
    if file.expires_at is not None:
        document["expires_at"] = file.expires_at
    return document


def upload_document(upload: Upload, file: StoredFile | None = None) -> dict[str, Any]:
    """OpenAI's upload object, with the file of one that is completed."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.nbytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose.value,
        "status": upload.state.value,
        "file": None if file is None else file_document(file),
    }


def part_document(part: Part) -> dict[str, Any]:
    """OpenAI's object of a part."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created_at,
        "upload_id": part.upload_id,
    }
