"""One WebSocket as its endpoint sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, QueryParams, State
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

SUBPROTOCOL = "realtime"
"""The subprotocol that clients of OpenAI's protocol offer."""

KEY_SUBPROTOCOL = "openai-insecure-api-key."
"""With a key behind it, this stands among the subprotocols of a browser, which can set no header.
It is never accepted as a subprotocol, as the answer would show the key."""

WAITING_BYTES = 2**18
"""Received bytes that may wait for the endpoint. With more, the client is held back."""

NORMAL, GOING_AWAY, POLICY, FAULT, RESTART, TRY_LATER = 1000, 1001, 1008, 1011, 1012, 1013
"""Codes of RFC 6455 with which a socket is closed."""

_OBJECT_BYTES = 64
"""What a message takes beside its characters."""

_REASON_BYTES = 123
"""A close frame holds no longer reason."""


class ClientLeft(ClientDisconnect):
    """The client has closed the socket, or does not read what it gets."""


class WebSocketConnection:
    """A WebSocket between its client and one endpoint.

    What a client sends is kept up to `WAITING_BYTES`, and one message more. Beyond that, TCP holds
    it back. When the client leaves, the endpoint is cancelled, whatever it waits for.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._waiting: deque[str | bytes] = deque()
        self.waiting_bytes = 0
        """What was received and waits for the endpoint."""
        self._changed = asyncio.Condition()
        self._accepted = False
        self._closed = False
        self._left = False
        self.headers = Headers(scope=scope)
        self.query = QueryParams(scope["query_string"])
        self.state = State(scope["state"])
        """As `request.state`: the request's id, and what its key may do."""
        self.subprotocols: tuple[str, ...] = tuple(
            each for each in scope.get("subprotocols", ()) if not each.startswith(KEY_SUBPROTOCOL)
        )
        """What the client offers, in its order."""

    async def accept(self, subprotocol: str | None = None) -> None:
        """Open the socket. Until then an error is an ordinary HTTP response.

        Without `subprotocol` it is `SUBPROTOCOL` if the client offers that: browsers close a socket
        that takes none of their offers.
        """
        if subprotocol is None and SUBPROTOCOL in self.subprotocols:
            subprotocol = SUBPROTOCOL
        self._accepted = True
        await self._pass({"type": "websocket.accept", "subprotocol": subprotocol, "headers": []})

    async def receive(self) -> str | bytes | None:
        """The next message: text or binary. None: the client has left, or the socket is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._left)
            if not self._waiting:
                return None
            message = self._waiting.popleft()
            self.waiting_bytes -= _held_bytes(message)
            self._changed.notify_all()
            return message

    async def send(self, data: str | bytes) -> None:
        """Send a message, of text or binary. Wait while the client does not read.

        Raises:
            ClientLeft: it has left, or has read nothing for `server.write_timeout_s`.

        """
        if self._left or self._closed:
            raise ClientLeft
        kind = "text" if isinstance(data, str) else "bytes"
        await self._pass({"type": "websocket.send", kind: data})

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close the socket, if it is open. A long reason is cut."""
        if self._closed or self._left:
            return
        self._closed = True
        await self._pass({"type": "websocket.close", "code": code, "reason": short(reason)})

    async def run(self, endpoint: Callable[[WebSocketConnection], Awaitable[None]]) -> None:
        """Run the endpoint, then close the socket. Cancel it once if the client leaves.

        Raises:
            ClientLeft: the client left before the socket was open.
            Exception: the error that the endpoint raised.

        """
        connect = await self._receive()
        if connect["type"] != "websocket.connect":
            raise ClientLeft
        task = asyncio.ensure_future(endpoint(self))
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait((task, reading), return_when=asyncio.FIRST_COMPLETED)
            if self._closed:  # by the endpoint, which is about to end
                await asyncio.wait((task,))
        finally:
            reading.cancel()
            if not task.done():
                task.cancel()
            await asyncio.wait((task, reading))
        if not task.cancelled():
            task.result()
            await self.close()

    async def _read(self) -> None:
        """Take in messages until the client leaves."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.waiting_bytes < WAITING_BYTES)
            event = await self._receive()
            async with self._changed:
                if event["type"] != "websocket.receive":
                    self._left = True
                    self._changed.notify_all()
                    return
                text = event.get("text")
                message: str | bytes = event["bytes"] if text is None else text
                self._waiting.append(message)
                self.waiting_bytes += _held_bytes(message)
                self._changed.notify_all()

    async def _pass(self, message: dict[str, object]) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise ClientLeft from error


def _held_bytes(message: str | bytes) -> int:
    # A flood of empty messages must not be free.
    return len(message) + _OBJECT_BYTES


def short(reason: str) -> str:
    """A reason that fits into a close frame."""
    return reason.encode()[:_REASON_BYTES].decode(errors="ignore")
