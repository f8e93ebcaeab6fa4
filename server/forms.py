"""The fields of a request: from JSON, from `multipart/form-data`, or from the query.

A form has no types and no structure: a field is text or a file. The official clients write
structure into the names, as in `image[]`, `input_reference[image_url]` and `loras[][name]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from engine.errors import InvalidRequest
from server.body import read_object, stream_body

MAX_FILES = 32
"""Twice what any endpoint takes (16 images), so an error for one too many names its field."""
MAX_FIELDS = 256
MAX_UPLOAD_FIELDS = 16
"""Beside the one file of an upload."""

_NAME = re.compile(r"(?P<field>[^\[\]]+)(?P<list>\[\])?(?:\[(?P<key>[^\[\]]+)\])?")


@dataclass(frozen=True, slots=True)
class Fields:
    """The values that a client sent, by field. Files are bytes; the text of a form is a string."""

    values: dict[str, Any]
    typed: bool
    """Whether the values have types (JSON), so that "1" is not the number 1."""


def query_fields(request: Request) -> Fields:
    """The fields of the query."""
    return Fields(dict(request.query_params), typed=False)


async def read_json(request: Request, max_bytes: int) -> Fields:
    """The fields of a body that is a JSON object.

    Raises:
        InvalidRequest: too long (status 413), not JSON, or not an object.
        ClientDisconnect: the client left while sending.

    """
    return Fields(await read_object(request, max_bytes), typed=True)


async def read_fields(request: Request, max_bytes: int) -> Fields:
    """The fields of a body: a form if its content type says so, otherwise a JSON object.

    Nothing is written to disk. The whole body has at most `max_bytes`.

    Raises:
        InvalidRequest: too long (status 413), malformed, or too many parts.
        ClientDisconnect: the client left while sending.

    """
    if not is_form(request):
        return await read_json(request, max_bytes)
    # Starlette moves files beyond `spool_bytes` to disk: here none.
    form = await parse_form(
        request, max_bytes, MAX_FILES, MAX_FIELDS, text_bytes=max_bytes, spool_bytes=max_bytes
    )
    try:
        values = await _structured(form)
        # Clients send an empty field for each setting that they were given no value for.
        return Fields({name: each for name, each in values.items() if each != ""}, typed=False)
    finally:
        await form.close()


def is_form(request: Request) -> bool:
    """Whether the content type of the body is a form."""
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
    new_file: Callable[[], BinaryIO] | None = None,
) -> FormData:
    """The body as a form, which the caller closes. Files beyond `spool_bytes` are kept on disk.

    A field of text may have `text_bytes`, by default Starlette's own limit. Where `new_file` is
    given, files are written to what it makes, from their first byte.

    Raises:
        InvalidRequest: too long (status 413), malformed, or too many parts.
        ClientDisconnect: the client left while sending.
        OSError: a file cannot be written to disk.

    """
    async with aclosing(stream_body(request, max_bytes)) as stream:
        parser = _FormParser(
            request.headers,
            stream,
            max_files=max_files,
            max_fields=max_fields,
            max_part_size=text_bytes,
        )
        parser.spool_max_size = spool_bytes
        parser.new_file = new_file
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest(f"The form cannot be read: {error.message}") from error


async def read_upload(
    request: Request, max_bytes: int, name: str, new_file: Callable[[], BinaryIO]
) -> tuple[Fields, str]:
    """The fields of a form with one file, and the file's name.

    The file goes to what `new_file` makes, and `name` is its field. Among the fields it is there
    without its bytes.

    Raises:
        InvalidRequest: it is no form, too long (status 413), malformed, or without that file.
        ClientDisconnect: the client left while sending.
        OSError: the file cannot be written.

    """
    if not is_form(request):
        raise InvalidRequest("Send the file as multipart/form-data.", param=name, status=415)
    form = await parse_form(
        request, max_bytes, 1, MAX_UPLOAD_FIELDS, spool_bytes=0, new_file=new_file
    )
    file = form.get(name)
    if not isinstance(file, UploadFile):
        raise InvalidRequest(f"Missing required parameter: '{name}'.", param=name)
    texts = FormData([item for item in form.multi_items() if item[1] is not file])
    values = await _structured(texts)
    if name in values:
        raise _twice(name)
    given = {key: value for key, value in values.items() if value != ""}
    return Fields({**given, name: [b""]}, typed=False), file.filename or ""


class _FormParser(MultiPartParser):
    """Starlette's, which writes files to where they stay, if that is known."""

    new_file: Callable[[], BinaryIO] | None = None

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None and self.new_file is not None:
            upload.file.close()
            upload.file = self.new_file()


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
    # Clients send `a[][x]` of all entries, then `a[][y]` of all. Which x belongs to which y is
    # clear only if every entry has both.
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
