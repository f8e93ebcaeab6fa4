"""A WebSocket of one client, as an endpoint uses it."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

MAX_MESSAGE_BYTES = 24 * 2**20
"""A longer message closes the connection with 1009. OpenAI's longest is 15 MiB of audio in base64,
which is 20 MiB of text."""


class ClientLeft(Exception):
    """The client left, or takes nothing any more."""


class WebSocketConnection:
    """Messages in and out. The server reads a message only when the endpoint asks for it.

    So a client that sends faster than it is served fills its own buffers, not the server's.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, write_timeout_s: float) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._left = False

    async def accept(self, subprotocol: str | None = None) -> None:
        """Accept the connection. Until then an error is an ordinary response."""
        message = await self._receive()
        if message["type"] != "websocket.connect":
            raise ClientLeft
        headers = [(b"x-request-id", self.scope["state"]["request_id"].encode())]
        await self._send(
            {"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers}
        )

    async def receive(self) -> str | bytes | None:
        """The next message; None if the client has left."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self._left = True
            return None
        text: str | bytes | None = message.get("text")
        return message.get("bytes", b"") if text is None else text

    async def send(self, text: str) -> None:
        """Send a message. Waits while the client does not read.

        Raises:
            ClientLeft: it has read nothing for the write timeout, or has left.

        """
        if self._left:
            raise ClientLeft
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "websocket.send", "text": text})
        except (TimeoutError, OSError, RuntimeError) as error:
            self._left = True
            raise ClientLeft from error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection, if the client is there. A reason has 123 bytes at most."""
        if not self._left:
            self._left = True
            try:
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
            except (OSError, RuntimeError):
                return
