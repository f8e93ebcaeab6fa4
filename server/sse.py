"""Server-sent events, and other response bodies that are sent piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from engine.events import Frame

FAILED = "roundhouse.failed"
"""Marks the last message of a response that reported an error. Servers pass over it."""


def event_frame(document: Mapping[str, Any]) -> Frame:
    """A document as an event. Its `type` is the event's name."""
    return Frame(f"event: {document['type']}\ndata: {json.dumps(document, allow_nan=False)}\n\n")


class BodyStream:
    """A response with status 200 whose length is not known when it begins."""

    def __init__(self, send: Send, media_type: str) -> None:
        self._send = send
        self._media_type = media_type
        self.begun = False

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the status and the headers, unless they are sent already."""
        if self.begun:
            return
        head = Response(
            headers={**headers, "cache-control": "no-cache"}, media_type=self._media_type
        )
        del head.headers["content-length"]
        self.begun = True
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": head.raw_headers}
        )

    async def send_bytes(self, piece: bytes) -> None:
        """Send a piece of the body. An empty piece sends nothing."""
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, *, failed: bool = False) -> None:
        """Complete the response. What is around it sees whether it `failed`."""
        mark = {FAILED: True} if failed else {}
        await self._send({"type": "http.response.body", "body": b"", "more_body": False, **mark})


class EventStream(BodyStream):
    """A response of server-sent events."""

    def __init__(self, send: Send) -> None:
        super().__init__(send, "text/event-stream")

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the status and the headers, unless they are sent already."""
        await super().begin({**headers, "x-accel-buffering": "no"})

    async def send(self, text: str) -> None:
        """Send complete events or comments, unchanged. An empty text sends nothing."""
        await self.send_bytes(text.encode())
