"""The engine's events as they come."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.scheduling.event_log import EventLog, LoggedEvent
from server.connection import run_while_connected
from server.documents import event_document, lost_document
from server.sse import EventStream, event_frame

HEARTBEAT_S = 15.0
"""Proxies close what is silent for longer (60 s is common)."""


class EventsResponse(Response):
    """Server-sent events with their ids, until the client leaves or the engine has drained.

    An event `lost` tells that some are missing before the next one: the client was away or read
    too slowly, and they were overwritten.
    """

    def __init__(self, log: EventLog, after: int | None) -> None:
        """Begin after the event `after`; None begins with what comes."""
        super().__init__()
        self._log = log
        self._last_id = log.last_id if after is None else after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send until one of the two sides ends."""
        await run_while_connected(self._send_events(send), receive)

    async def _send_events(self, send: Send) -> None:
        stream = EventStream(send)
        await stream.begin({})
        more = True
        while more:
            page = self._log.after(self._last_id)
            self._last_id = page.last_id
            if page.lost is not None:
                await stream.send(event_frame(lost_document(page.lost)).data)
            for event in page.events:
                await stream.send(_text(event))
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    more = await self._log.wait(self._last_id)
            except TimeoutError:
                await stream.send(": still here\n\n")
        await stream.end()


def _text(event: LoggedEvent) -> str:
    return f"id: {event.id}\n{event_frame(event_document(event)).data}"
