"""The body of a line's request: JSON, or a form where the endpoint takes a file."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable
from typing import Any

from engine.errors import InvalidRequest
from engine.words import echoed
from server.batches.input import FILE_FIELDS, file_id_of

JSON = "application/json"
_FORMS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})

ReadFile = Callable[[str], bytes]
"""The bytes of a stored file, by its id."""


def encode_body(endpoint: str, body: dict[str, Any], read_file: ReadFile) -> tuple[bytes, str]:
    """The body and its content type. Ids of stored files become their bytes. Blocks on the disk.

    Raises:
        InvalidRequest: `file` is neither an id nor a `data:` URL.
        NotFound: there is no such file any more.

    """
    if endpoint in _FORMS:
        return _form(body, read_file)
    fields = FILE_FIELDS.get(endpoint, ())
    for field in fields:
        value = body.get(field)
        if isinstance(value, list):
            body = {**body, field: [_picture(each, read_file) for each in value]}
        elif value is not None:
            body = {**body, field: _picture(value, read_file)}
    return json.dumps(body).encode(), JSON


def _picture(value: Any, read_file: ReadFile) -> Any:
    file_id = file_id_of(value)
    if file_id is None:
        return value
    return base64.b64encode(read_file(file_id)).decode()


def _form(body: dict[str, Any], read_file: ReadFile) -> tuple[bytes, str]:
    boundary = secrets.token_hex(16)
    pieces: list[bytes] = []

    def add(disposition: str, data: bytes) -> None:
        head = f"--{boundary}\r\ncontent-disposition: form-data; {disposition}\r\n\r\n"
        pieces.extend((head.encode(), data, b"\r\n"))

    for name, value in body.items():
        if not name.isidentifier():  # it would go into the head of a part
            raise InvalidRequest(f"Unknown parameter: {echoed(name)}.", param=name[:100])
        if name == "file":
            add('name="file"; filename="audio"', _recording(value, read_file))
        elif isinstance(value, list):
            for each in value:
                add(f'name="{name}[]"', _text(each))
        elif isinstance(value, dict):
            for key, each in value.items():
                if not key.isidentifier():
                    raise InvalidRequest(f"Unknown parameter: {echoed(key)}.", param=name)
                add(f'name="{name}[{key}]"', _text(each))
        elif value is not None:
            add(f'name="{name}"', _text(value))
    pieces.append(f"--{boundary}--\r\n".encode())
    return b"".join(pieces), f"multipart/form-data; boundary={boundary}"


def _recording(value: Any, read_file: ReadFile) -> bytes:
    file_id = file_id_of(value)
    if file_id is not None:
        return read_file(file_id)
    if isinstance(value, str) and value.startswith("data:") and ";base64," in value:
        try:
            return base64.b64decode(value.partition(";base64,")[2], validate=True)
        except ValueError as error:
            raise InvalidRequest("file: it is not valid base64.", param="file") from error
    message = "file: in a batch it is the id of a stored file, or a data: URL with base64."
    raise InvalidRequest(message, param="file")


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value).encode()
