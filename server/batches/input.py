"""Reads the input of a batch: every line is checked before the first one runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic_core import from_json

from engine.errors import EngineError, NotFound
from engine.requests import Priority
from engine.words import echoed
from server.batches.record import Line, LineError
from server.keys.access import Access

if TYPE_CHECKING:
    from engine.engine import Engine

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""What a batch may ask for."""

MODERATIONS = "/v1/moderations"
FILE_FIELDS = {
    "/v1/images/edits": ("image", "mask"),
    "/v1/images/variations": ("image",),
    "/v1/audio/transcriptions": ("file",),
    "/v1/audio/translations": ("file",),
}
"""Fields of a body that may be the id of a stored file."""

MAX_LINES = 50_000
"""OpenAI's limit."""
MAX_ERRORS = 100
"""More are not reported."""
MAX_ID_CHARS = 512

_KEYS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Checks:
    """What lines are checked against."""

    engine: Engine
    access: Access
    endpoint: str
    max_line_bytes: int
    find_file: Callable[[str], object]
    """Raises `NotFound` if the key sees no such file."""

    def group(self, body: dict[str, Any]) -> str:
        """The id of the model, or the name of the route, that serves a body.

        Raises:
            _Wrong: naming the field at fault.

        """
        model = body.get("model")
        if model is None and self.endpoint == MODERATIONS:
            models = self.engine.config.models
            model = next((each.id for each in models if each.task == "classify"), None)
        if not isinstance(model, str) or not model:
            raise _Wrong("invalid_request", "You must name a model, as a string.", "body.model")
        try:
            self.access.check_model(model)
            if model in self.engine.router:
                return model
            return self.engine.config.find(model).id
        except EngineError as error:
            raise _Wrong(error.code, error.message, "body.model") from None


class _Wrong(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def read_input(stream: BinaryIO, batch: int, checks: Checks) -> tuple[list[Line], list[LineError]]:
    """The lines of the input, and what is wrong with it. Empty lines are skipped."""
    lines: list[Line] = []
    errors: list[LineError] = []
    seen: dict[str, int] = {}
    for number, offset, raw in _raw_lines(stream, checks.max_line_bytes):
        if len(errors) >= MAX_ERRORS:
            break
        if len(lines) >= MAX_LINES:
            message = f"The file has more than {MAX_LINES} requests."
            errors.append(LineError("too_many_tasks", message))
            break
        try:
            if raw is None:
                most = checks.max_line_bytes
                raise _Wrong("line_too_long", f"The line has more than {most} bytes.")
            custom_id, group = _check(raw, checks)
            first = seen.setdefault(custom_id, number)
            if first != number:
                message = f"The custom_id {echoed(custom_id)} is that of line {first} as well."
                raise _Wrong("duplicate_custom_id", message, "custom_id")
            lines.append(Line(batch, number, custom_id, group, offset, len(raw)))
        except _Wrong as wrong:
            errors.append(LineError(wrong.code, wrong.message, wrong.param, number))
    if not lines and not errors:
        errors.append(LineError("empty_file", "The file has no requests."))
    return lines, errors


def _raw_lines(stream: BinaryIO, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The number, the place and the bytes of each line; no bytes of one that is too long."""
    offset, number = 0, 0
    while raw := stream.readline(most + 1):
        number += 1
        begin = offset
        offset += len(raw)
        if len(raw) > most and not raw.endswith(b"\n"):
            while (rest := stream.readline(most)) and not rest.endswith(b"\n"):
                offset += len(rest)
            offset += len(rest)
            yield number, begin, None
            continue
        if number == 1 and raw.startswith(_BOM):
            begin += len(_BOM)
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield number, begin, raw


def _check(raw: bytes, checks: Checks) -> tuple[str, str]:
    """The custom id of a line, and the group that it belongs to."""
    try:
        document = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise _Wrong("invalid_json_line", f"The line is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise _Wrong("invalid_json_line", "The line is not a JSON object.")
    for key in document:
        if key not in _KEYS:
            raise _Wrong("invalid_request", f"Unknown parameter: {echoed(key)}.", key[:100])
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        message = f"A custom_id is a text of 1 to {MAX_ID_CHARS} characters."
        raise _Wrong("missing_required_parameter", message, "custom_id")
    if document.get("method") != "POST":
        raise _Wrong("invalid_method", "The method is POST.", "method")
    if document.get("url") != checks.endpoint:
        message = f"The url is the endpoint of the batch, {checks.endpoint}."
        raise _Wrong("invalid_url", message, "url")
    body = document.get("body")
    if not isinstance(body, dict):
        raise _Wrong("invalid_request", "The body is a JSON object.", "body")
    if body.get("stream"):
        raise _Wrong("invalid_request", "A batch has no streams.", "body.stream")
    if str(body.get("priority") or _BATCH).lower() != _BATCH:
        message = f"Lines of a batch have the priority {_BATCH}."
        raise _Wrong("invalid_request", message, "body.priority")
    group = checks.group(body)
    for field in FILE_FIELDS.get(checks.endpoint, ()):
        values = body.get(field)
        for value in values if isinstance(values, list) else [values]:
            file_id = file_id_of(value)
            if file_id is not None:
                try:
                    checks.find_file(file_id)
                except NotFound as error:
                    raise _Wrong(error.code, error.message, f"body.{field}") from None
    return custom_id, group


_BATCH = Priority.BATCH.name.lower()


def file_id_of(value: Any) -> str | None:
    """The id of a stored file that a field names: the id itself, or an object with `file_id`."""
    if isinstance(value, dict) and value.keys() == {"file_id"}:
        value = value["file_id"]
        return value if isinstance(value, str) else None
    return value if isinstance(value, str) and value.startswith("file-") else None


def read_line(stream: BinaryIO, line: Line) -> dict[str, Any]:
    """The body of a line that was checked. Threads may read side by side: no place is shared."""
    document = from_json(os.pread(stream.fileno(), line.nbytes, line.offset), allow_inf_nan=False)
    body: dict[str, Any] = document["body"]
    return body
