"""The engine's event log as a stream of server-sent events."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from engine.scheduling.event_log import EventLog, LoggedEvent
from server.documents import event_document, lost_document
from server.sse import EventStream, event_frame

HEARTBEAT_S = 15.0
"""Proxies close a connection that is silent for longer (60 s is common)."""


async def send_events(log: EventLog, after: int | None, send: Send) -> None:
    """Send server-sent events with their ids, until the engine has drained.

    The first is the event after `after`; None begins with the next event. An event `lost` reports
    that some are missing before the next one. The client was away or read too slowly, and they
    were overwritten.
    """
    last_id = log.last_id if after is None else after
    stream = EventStream(send)
    await stream.begin({})
    more = True
    while more:
        page = log.after(last_id)
        last_id = page.last_id
        if page.lost is not None:
            await stream.send(event_frame(lost_document(page.lost)).data)
        for event in page.events:
            await stream.send(_text(event))
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                more = await log.wait(last_id)
        except TimeoutError:
            await stream.send(": still here\n\n")
    await stream.end()


def _text(event: LoggedEvent) -> str:
    return f"id: {event.id}\n{event_frame(event_document(event)).data}"
