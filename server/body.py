"""Reads a request body: at most so many bytes, once, and as a JSON object."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from engine.errors import InvalidRequest

_BOM = b"\xef\xbb\xbf"

_PIECE_BYTES = 2**20
"""Decoded at once: the event loop has its turn between two pieces."""


async def stream_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body, piece by piece as it comes, decoded if it was sent with gzip or deflate.

    `max_bytes` is the limit of what was sent, and of what that is decoded.

    Raises:
        InvalidRequest: it is too long (status 413), not what its encoding says, or in another
            encoding (status 415).
        ClientDisconnect: the client left while sending.

    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_long(max_bytes)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise InvalidRequest(
            f"The body's encoding {encoding[:100]!r} is not supported; send gzip, deflate or none.",
            status=415,
        )
    chunks = _sent(request, max_bytes)
    if encoding in ("", "identity"):
        async for chunk in chunks:
            yield chunk
        return
    nbytes = 0
    async for piece in _decoded(chunks):
        nbytes += len(piece)
        if nbytes > max_bytes:
            raise _too_long(max_bytes)
        yield piece


async def _sent(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    nbytes = 0
    async for chunk in request.stream():
        nbytes += len(chunk)
        if nbytes > max_bytes:
            raise _too_long(max_bytes)
        yield chunk


async def _decoded(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip, or zlib as deflate means
    try:
        async for chunk in chunks:
            rest = chunk
            while rest and not decoder.eof:
                yield decoder.decompress(rest, _PIECE_BYTES)
                rest = decoder.unconsumed_tail
                if rest:
                    await asyncio.sleep(0)
        while not decoder.eof and (piece := decoder.decompress(b"", _PIECE_BYTES)):
            yield piece
    except zlib.error as error:
        raise InvalidRequest(f"The compressed body cannot be read: {error}.") from error
    if not decoder.eof:
        raise InvalidRequest("The compressed body ends too early.")


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        InvalidRequest: too long (status 413), not JSON, or not an object.
        ClientDisconnect: the client left while sending.

    """
    chunks = [chunk async for chunk in stream_body(request, max_bytes)]
    raw = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return parse_object(raw.removeprefix(_BOM), "body")


def parse_object(data: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. `what` it is, a body or a message, stands in errors.

    Raises:
        InvalidRequest: it is not JSON, or not an object.

    """
    try:
        # Unlike `json`, this refuses NaN and lone surrogates, which no tokenizer takes. It also
        # refuses more than 200 levels, which would exhaust the stack here or later.
        document = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The {what} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"The {what} must be a JSON object.")
    return document


def _too_long(max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"The body is longer than {max_bytes} bytes.", status=413)
