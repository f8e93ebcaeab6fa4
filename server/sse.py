"""Server-sent events: a stream that may begin, and tell of its wait, before there is an answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError
from engine.events import Document, Frame
from engine.requests import Request
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from server.errors import Failure
from server.headers import HEADER_PREFIX, answer_headers

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long a request may wait before its response begins with status 200. What fails earlier still
has an HTTP status of its own."""

PROGRESS_INTERVAL_S = 1.0

Frames: TypeAlias = Callable[["Session"], AsyncGenerator[Frame, None]]
"""The answer as complete events. A frame without text begins the response and sends nothing."""


def event_frame(document: Mapping[str, Any]) -> Frame:
    """A document as an event named by its `type`."""
    return Frame(f"event: {document['type']}\ndata: {json.dumps(document, allow_nan=False)}\n\n")


class EventStream:
    """A response of server-sent events on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and the headers, if that was not done before."""
        if self.begun:
            return
        head = Response(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del head.headers["content-length"]
        self.begun = True
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": head.raw_headers}
        )

    async def send(self, text: str) -> None:
        """Send whole events or comments, as they are."""
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end(self) -> None:
        """Complete the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream_answer(
    engine: Engine, request: Request, frames: Frames, send: Send, *, tells: bool = True
) -> Response | None:
    """Open a session for the request and send what `frames` makes of it.

    The response begins with the first frame; or, for a request that still waits for its grant after
    `GRACE_S`, with comments that tell its position and when it can expect to be served, which
    clients pass over. Where the client may not know what to make of these, `tells` is False. What
    fails once the response has begun is logged, and told by a last event.

    Returns:
        The response to send instead, if the model gave a whole document.

    Raises:
        Exception: whatever failed before the response began.

    """
    stream = EventStream(send)
    try:
        # The session is closed before the last piece is sent: see run_while_connected.
        async with AsyncExitStack() as stack:
            waiting = Waiting()
            async with _telling(engine, request, waiting, stream) if tells else nullcontext():
                session = await engine.open(request, waiting)
                stack.push_async_callback(session.close)
            headers = answer_headers(session)
            if isinstance(session.first, Document) and not stream.begun:
                return Response(session.first.body, headers=headers, media_type="application/json")
            if stream.begun:
                await stream.send(_granted_comment(headers))
            async with aclosing(frames(session)) as answer:
                async for frame in answer:
                    if not stream.begun:
                        await stream.begin(headers)
                    if frame.data:
                        await stream.send(frame.data)
    except Exception as error:
        if not stream.begun:
            raise
        # The status is sent already: the stream itself must tell.
        expected = isinstance(error, EngineError)
        logger.error("stream %s failed: %s", request.request_id, error, exc_info=not expected)
        await stream.send(Failure.of(error).frame(request.operation, request.request_id))
    await stream.end()
    return None


@asynccontextmanager
async def _telling(
    engine: Engine, request: Request, waiting: Waiting, stream: EventStream
) -> AsyncIterator[None]:
    """Tell of the wait as long as the body of this context lasts."""
    over = asyncio.Event()
    teller = asyncio.create_task(_tell(engine, request.model, waiting, stream, over))
    try:
        yield
    except asyncio.CancelledError:
        # Nobody reads any more, and what is being sent may never get through.
        teller.cancel()
        raise
    finally:
        over.set()
        await teller  # not cancelled: it may be in the middle of a head


async def _tell(
    engine: Engine, model: str, waiting: Waiting, stream: EventStream, over: asyncio.Event
) -> None:
    pause_s = GRACE_S
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await over.wait()
                return
        status = engine.wait_status(waiting)
        if status.stage is Stage.RUNNING and not stream.begun:
            continue  # granted in time: its first event decides what the response is
        await stream.begin({})
        await stream.send(_wait_comment(status, model))
        pause_s = PROGRESS_INTERVAL_S


def _wait_comment(status: WaitStatus, model: str) -> str:
    """`: queued position=3 eta=12.4s`, `: loading llama eta=2.1s`."""
    words = [status.stage.value]
    if status.stage is Stage.QUEUED:
        words.append(f"position={status.position}")
    elif status.stage is not Stage.STARTING:
        words.append(model)
    if status.eta_s is not None:
        words.append(f"eta={status.eta_s:.1f}s")
    return f": {' '.join(words)}\n\n"


def _granted_comment(headers: Mapping[str, str]) -> str:
    """What the headers would have told, had they not been sent before it was known."""
    told = (f"{name.removeprefix(HEADER_PREFIX)}={value}" for name, value in headers.items())
    return f": granted {' '.join(told)}\n\n"
