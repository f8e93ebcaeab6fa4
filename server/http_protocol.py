"""uvicorn's HTTP protocol, which gives up clients that do not read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from server.websocket.write_watch import WriteWatch


def http_protocol(write_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol class for a server. `WriteWatch` says when it cuts a connection."""

    class Protocol(WriteWatch, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Hands the connection over when a client asks for a WebSocket."""

        watch_s = write_timeout_s

    return Protocol
