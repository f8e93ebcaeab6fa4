"""One HTTP request and the bytes of its answer, at the least cost for the client.

At 256 streams httpx takes 360 µs for each piece and so reads 2,800 a second at most. On a small
machine the measurement would measure httpx. A socket read costs 45 µs. So this client only stores
pieces while answers come, and parses them when all have come.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

READ_BYTES = 1 << 16
CRLF = b"\r\n"


class BadAnswer(Exception):
    """The bytes are not a complete HTTP answer. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """All bytes from a connection, until the server closed it."""

    sent_s: float
    """On the clock `time.perf_counter`."""
    pieces: tuple[tuple[float, bytes], ...]
    """Each with the seconds since the request was sent."""
    error: str | None = None
    """Why the connection ended too early."""

    @property
    def end_s(self) -> float:
        """When the last piece came, since the request was sent."""
        return self.pieces[-1][0] if self.pieces else 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer without its framing on the wire."""

    status: int
    pieces: tuple[tuple[float, bytes], ...]
    """Of the body, as in `Exchange`."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)


async def exchange(request: httpx.Request, timeout_s: float) -> Exchange:
    """Send a request on a connection of its own and store all that comes back.

    The request's body must have been read. Never raises OSError.
    """
    url = request.url
    context = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if context else 80)
    pieces: list[tuple[float, bytes]] = []
    sent_s = time.perf_counter()
    error: str | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(url.host, port, ssl=context)
            try:
                writer.write(_wire(request))
                while piece := await reader.read(READ_BYTES):
                    pieces.append((time.perf_counter() - sent_s, piece))
            finally:
                writer.close()
    except TimeoutError:
        error = f"no end within {timeout_s:g} s"
    except OSError as problem:
        error = f"connection failed: {problem.strerror or problem}"
    return Exchange(sent_s, tuple(pieces), error)


def read_response(seen: Exchange) -> Response:
    """Take the status and the pieces of the body out of an exchange.

    Raises:
        BadAnswer: the connection failed, or the answer broke off or is not HTTP/1.

    """
    if seen.error is not None:
        raise BadAnswer(seen.error)
    whole = b"".join(piece for _, piece in seen.pieces)
    head_bytes = whole.find(CRLF + CRLF) + 4
    if head_bytes < 4 or not whole.startswith(b"HTTP/1."):
        raise BadAnswer(
            "no HTTP answer" if whole else "the connection was closed without an answer"
        )
    first, *lines = whole[:head_bytes].decode("latin-1").split("\r\n")
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines if line)
    }
    pieces = _without(seen.pieces, head_bytes)
    if "chunked" in fields.get("transfer-encoding", "").lower():
        decoder = _Chunks()
        body = tuple((at_s, data) for at_s, piece in pieces if (data := decoder.feed(piece)))
        complete = decoder.ended
    else:
        body = tuple(pieces)
        length = fields.get("content-length")
        complete = length is None or sum(len(piece) for _, piece in body) == int(length)
    if not complete:
        raise BadAnswer("the answer broke off")
    return Response(int(first.split()[1]), body)


def events(response: Response) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event and when its last byte came.

    `data` must be one line, as in OpenAI's interface.
    """
    rest = b""
    for at_s, piece in response.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line[5:].strip()


def _wire(request: httpx.Request) -> bytes:
    path = request.url.raw_path.decode("ascii")
    head = [f"{request.method} {path} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in request.headers.items()]
    # The end of the connection is then the end of the answer, so nothing has to be parsed while
    # other answers still come.
    head += ["connection: close", "", ""]
    return "\r\n".join(head).encode("latin-1") + request.content


def _without(pieces: tuple[tuple[float, bytes], ...], nbytes: int) -> Iterator[tuple[float, bytes]]:
    """The pieces without the first `nbytes` bytes."""
    for at_s, piece in pieces:
        if left := piece[nbytes:]:
            yield at_s, left
        nbytes = max(0, nbytes - len(piece))


class _Chunks:
    """Decodes the chunked transfer coding (RFC 9112, 7.1), piece by piece."""

    def __init__(self) -> None:
        self.ended = False
        self._left = 0
        """Bytes of the present chunk that are still to come, its line end among them."""
        self._line = b""

    def feed(self, piece: bytes) -> bytes:
        """The data in a piece.

        Raises:
            BadAnswer: this is not a chunked coding.

        """
        data = b""
        while piece and not self.ended:
            if self._left:
                taken, piece = piece[: self._left], piece[self._left :]
                # The last two bytes of the rest are the line end, whole or in part.
                data += taken[: max(0, self._left - 2)]
                self._left -= len(taken)
                continue
            self._line += piece
            line, found, piece = self._line.partition(CRLF)
            if not found:
                return data
            self._line = b""
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError as error:
                raise BadAnswer("the answer is not chunked as it says") from error
            self.ended = size == 0
            self._left = size + 2
        return data
