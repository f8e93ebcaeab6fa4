"""Reading `multipart/form-data`: bounded, in memory, and with the nested names that SDKs send.

A form has no types and no structure: everything is text or a file, and the official clients
write structure into the names, as `image[]`, `input_reference[image_url]` and `loras[][name]`.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from engine.errors import InvalidRequest
from server.body import read_object, stream_body

MAX_FILES = 32
"""Twice what any endpoint takes (16 images), so that one too many is told by its field."""
MAX_FIELDS = 256

_NAME = re.compile(r"(?P<field>[^\[\]]+)(?P<list>\[\])?(?:\[(?P<key>[^\[\]]+)\])?")


@dataclass(frozen=True, slots=True)
class Fields:
    """What a client sent, by field. Files are bytes; the text of a form is a string."""

    values: dict[str, Any]
    typed: bool
    """Whether the values came with types (JSON), so that "1" is not the number 1."""


async def read_fields(request: Request, max_bytes: int) -> Fields:
    """The body as a form where it says that it is one, else as a JSON object.

    Nothing is written to disk: the whole body is at most `max_bytes`.

    Raises:
        InvalidRequest: too long (status 413), malformed, or too many parts.
        ClientDisconnect: the client left while sending.

    """
    if not is_form(request):
        return Fields(await read_object(request, max_bytes), typed=True)
    # Starlette moves files beyond a size to disk: here none.
    form = await parse_form(
        request, max_bytes, MAX_FILES, MAX_FIELDS, text_bytes=max_bytes, spool_bytes=max_bytes
    )
    try:
        return Fields(await _structured(form), typed=False)
    finally:
        await form.close()


def is_form(request: Request) -> bool:
    """Whether the body is said to be a form."""
    content_type = request.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


async def parse_form(
    request: Request,
    max_bytes: int,
    max_files: int,
    max_fields: int,
    *,
    text_bytes: int = 2**20,
    spool_bytes: int,
) -> FormData:
    """The body as a form, to be closed; files beyond `spool_bytes` are kept on disk meanwhile.

    A field of text may have `text_bytes`, by itself Starlette's own bound.

    Raises:
        InvalidRequest: too long (status 413), malformed, or too many parts.
        ClientDisconnect: the client left while sending.
        OSError: the disk does not take a file.

    """
    async with aclosing(stream_body(request, max_bytes)) as stream:
        parser = MultiPartParser(
            request.headers,
            stream,
            max_files=max_files,
            max_fields=max_fields,
            max_part_size=text_bytes,
        )
        parser.spool_max_size = spool_bytes
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest(f"The form cannot be read: {error.message}") from error


async def _structured(form: FormData) -> dict[str, Any]:
    values: dict[str, Any] = {}
    columns: dict[str, dict[str, list[str | bytes]]] = {}
    for name, item in form.multi_items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        field, key = match["field"], match["key"]
        value = await item.read() if isinstance(item, UploadFile) else item
        if match["list"] and key:
            columns.setdefault(field, {}).setdefault(key, []).append(value)
        elif match["list"] or (isinstance(item, UploadFile) and key is None):
            # Several files under one plain name are a list too, as `curl -F` sends them.
            _put(values, field, [], list).append(value)
        elif key:
            entries = _put(values, field, {}, dict)
            if key in entries:
                raise _twice(name)
            entries[key] = value
        elif field in values:
            raise _twice(name)
        else:
            values[field] = value
    for field, column in columns.items():
        if field in values:
            raise _twice(field)
        values[field] = _rows(field, column)
    return values


def _put(values: dict[str, Any], field: str, empty: Any, kind: type) -> Any:
    held = values.setdefault(field, empty)
    if not isinstance(held, kind):
        raise _twice(field)
    return held


def _rows(field: str, column: dict[str, list[str | bytes]]) -> list[dict[str, str | bytes]]:
    # Clients send `a[][x]` of all entries, then `a[][y]` of all: which x belongs to which y can
    # be told only where every entry has both.
    if len({len(entries) for entries in column.values()}) != 1:
        raise InvalidRequest(
            f"In a form every entry of '{field}' must have the same keys.", param=field
        )
    keys = list(column)
    return [
        dict(zip(keys, row, strict=True)) for row in zip(*(column[k] for k in keys), strict=True)
    ]


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"The parameter '{name}' is given more than once.", param=name)
