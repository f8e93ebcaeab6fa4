"""Reads a request body: at most so many bytes, once, and as a JSON object."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from engine.errors import InvalidRequest


async def stream_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The pieces of the body as they come.

    Raises:
        InvalidRequest: it is too long (status 413).
        ClientDisconnect: the client left while sending.

    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_long(max_bytes)
    nbytes = 0
    async for chunk in request.stream():
        nbytes += len(chunk)
        if nbytes > max_bytes:
            raise _too_long(max_bytes)
        yield chunk


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        InvalidRequest: too long (status 413), not JSON, or not an object.
        ClientDisconnect: the client left while sending.

    """
    raw = bytearray()
    async for chunk in stream_body(request, max_bytes):
        raw += chunk
    try:
        # Unlike `json`, this refuses NaN and lone surrogates, which no tokenizer takes. It also
        # refuses more than 200 levels, which would exhaust the stack here or later.
        document = from_json(bytes(raw), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return document


def _too_long(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"The body is longer than {max_bytes} bytes.", status=413)
