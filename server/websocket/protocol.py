"""uvicorn's WebSocket protocol: bounded in both directions, and silent in the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, TypedDict

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.websocket.write_watch import WriteWatch

PING_S = 20.0
"""The interval of pings, and how long a client has to answer one."""

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.WARNING)
"""uvicorn logs each URL with its query, in which a client may have put a key. `RequestContext` logs
sockets without it."""


class WebSocketOptions(TypedDict):
    """Arguments of `uvicorn.Config`."""

    ws: type[asyncio.Protocol]
    ws_max_size: int
    ws_ping_interval: float
    ws_ping_timeout: float
    ws_per_message_deflate: bool


def websocket_options(write_timeout_s: float, max_message_bytes: int) -> WebSocketOptions:
    """How a server takes WebSockets. A longer message closes the connection with 1009."""
    return {
        "ws": websocket_protocol(write_timeout_s),
        "ws_max_size": max_message_bytes,
        "ws_ping_interval": PING_S,
        "ws_ping_timeout": PING_S,
        # Audio gains nothing, and a small message may become a GiB.
        "ws_per_message_deflate": False,
    }


def websocket_protocol(write_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol class for a server. `WriteWatch` says when it cuts a connection.

    uvicorn stops to read after each message until the application has taken it. So a client that
    floods is held back by TCP.
    """

    class Protocol(WriteWatch, WebSocketsSansIOProtocol):
        """One connection after its upgrade."""

        watch_s = write_timeout_s

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.logger = self.conn.logger = _logger
            self.conn.debug = False  # it would log the headers, in which there are keys

        async def send(self, message: Any) -> None:
            """Send a message of the application."""
            await super().send(message)
            if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
                # Otherwise uvicorn logs as an error that a refused handshake is not complete.
                self.handshake_complete = True

        def keepalive_timeout(self) -> None:
            """No answer came to a ping. While reading is paused none can come."""
            if self.read_paused:
                self.pong_timer = None
                self.pending_ping_payload = None
                self.schedule_ping()
            else:
                super().keepalive_timeout()

    return Protocol
