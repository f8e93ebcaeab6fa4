"""Keeps a copy of an answer while it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Send

from server.headers import CACHE_HEADER, HEADER_PREFIX, SERVED_BY_HEADER
from server.response_cache.entry import Entry
from server.sse import FAILED

OF_THE_CONTENT = frozenset(
    {
        "content-type",
        "cache-control",
        "x-accel-buffering",
        f"{HEADER_PREFIX}cut",
        f"{HEADER_PREFIX}weights",
        SERVED_BY_HEADER,
    }
)
"""Headers that are kept. All others are about one request: its id, its time, its costs."""

_COMMENT = b": "
"""Begins what a stream sends about its wait. A replay does not wait."""


class Recorder:
    """Passes the messages of an answer on. Once all are there, it hands over the entry.

    An answer that failed, was cut or is too long is never handed over.
    """

    def __init__(
        self, send: Send, label: str, max_bytes: int, on_complete: Callable[[Entry], None]
    ) -> None:
        """`label` is what the answer's header says. `on_complete` is called at most once."""
        self._send = send
        self._label = label
        self._left_bytes = max_bytes
        self._on_complete = on_complete
        self._head: dict[str, str] | None = None
        self._pieces: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Take and send a message of the answer."""
        if message["type"] == "http.response.start":
            if message["status"] == 200:
                self._head = _kept_headers(message["headers"])
            label = (CACHE_HEADER.encode(), self._label.encode())
            message = {**message, "headers": [*message["headers"], label]}
        elif self._head is not None:
            self._take(message, self._head)
        await self._send(message)

    def whole(self, response: Response) -> Response:
        """Take an answer that is sent as a whole."""
        body = bytes(response.body)
        if response.status_code == 200 and len(body) <= self._left_bytes:
            head = _kept_headers(response.raw_headers)
            self._on_complete(Entry(200, head, (body,), streamed=False))
        response.headers[CACHE_HEADER] = self._label
        return response

    def _take(self, message: Message, head: dict[str, str]) -> None:
        piece = message.get("body", b"")
        if piece and not piece.startswith(_COMMENT):
            self._left_bytes -= len(piece)
            self._pieces.append(piece)
        if self._left_bytes < 0 or message.get(FAILED):
            self._head = None
            self._pieces.clear()
        elif not message.get("more_body"):
            # Before it is sent: the end of a response ends this task as a disconnect would.
            self._head = None
            self._on_complete(Entry(200, head, tuple(self._pieces), streamed=True))


def _kept_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    headers = Headers(raw=list(raw))
    return {name: value for name, value in headers.items() if name in OF_THE_CONTENT}
