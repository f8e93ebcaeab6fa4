"""The answer of a model to one request, as a stream of events or as a whole."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, TypeAlias

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError
from engine.events import Document, Event, Frame
from engine.requests import Request
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from server.errors import Failure
from server.headers import HEADER_PREFIX, answer_headers
from server.sse import EventStream

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long a request may wait before its response begins with status 200. An error before that
still has an HTTP status of its own."""

PROGRESS_INTERVAL_S = 1.0

Frames: TypeAlias = Callable[["Session"], AsyncGenerator[Frame, None]]
"""The answer as complete events. A frame without text begins the response and sends nothing."""

Render: TypeAlias = Callable[[Sequence[Event]], Awaitable[Response]]
"""Makes the response from all events of a session."""


async def whole_answer(engine: Engine, request: Request, render: Render) -> Response:
    """Run the request to its end and make the response from its events.

    Raises:
        Exception: the error of the request, or of `render`.

    """
    session = await engine.open(request)
    began_s = time.perf_counter()
    async with aclosing(session.events()) as running:
        events = [event async for event in running]
    ran_ms = (time.perf_counter() - began_s) * 1e3
    # The session ended with its events: the device is free while the response is made.
    response = await render(events)
    response.headers.update(answer_headers(session, ran_ms))
    return response


async def stream_answer(
    engine: Engine, request: Request, frames: Frames, send: Send, *, shows_wait: bool = True
) -> Response | None:
    """Open a session for the request and send the frames of its answer.

    The response begins with the first frame. If the request still waits for its grant after
    `GRACE_S`, the response begins with comments: its position and its ETA. Clients skip comments.
    `shows_wait` is False for a client that may not expect them. An error after the response has
    begun is logged, and sent as the last event.

    Returns:
        The response to send instead, if the model gave a whole document.

    Raises:
        Exception: an error before the response began.

    """
    stream = EventStream(send)
    try:
        # The session is closed before the last piece is sent: see run_while_connected.
        async with AsyncExitStack() as stack:
            waiting = Waiting()
            shown = _shown_wait(engine, request, waiting, stream) if shows_wait else nullcontext()
            async with shown:
                session = await engine.open(request, waiting)
                stack.push_async_callback(session.close)
            headers = answer_headers(session)
            if isinstance(session.first, Document) and not stream.begun:
                return Response(session.first.body, headers=headers, media_type="application/json")
            if stream.begun:
                await stream.send(_granted_comment(headers))
            if isinstance(session.first, Document):
                # Comments about the wait have begun a stream: the document is its only event.
                await stream.send(f"data: {session.first.body.decode()}\n\n")
            async with aclosing(frames(session)) as answer:
                async for frame in answer:
                    if not stream.begun:
                        await stream.begin(headers)
                    if frame.data:
                        await stream.send(frame.data)
    except Exception as error:
        if not stream.begun:
            raise
        # The status is sent already, so the stream itself must report the error.
        expected = isinstance(error, EngineError)
        logger.error("stream %s failed: %s", request.request_id, error, exc_info=not expected)
        await stream.send(Failure.of(error).frame(request.operation, request.request_id))
    await stream.end()
    return None


@asynccontextmanager
async def _shown_wait(
    engine: Engine, request: Request, waiting: Waiting, stream: EventStream
) -> AsyncIterator[None]:
    """Send comments about the wait while the body of this context runs."""
    over = asyncio.Event()
    reporter = asyncio.create_task(_report_wait(engine, request.model, waiting, stream, over))
    try:
        yield
    except asyncio.CancelledError:
        # The client reads no more, so a send under way may never complete.
        reporter.cancel()
        raise
    finally:
        over.set()
        await reporter  # not cancelled: it may be in the middle of a head


async def _report_wait(
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
            continue  # granted in time: its first event decides the kind of response
        await stream.begin({})
        await stream.send(_wait_comment(status, engine.config.find(model).id))
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
    """The content of our headers, which were sent before it was known."""
    fields = (f"{name.removeprefix(HEADER_PREFIX)}={value}" for name, value in headers.items())
    return f": granted {' '.join(fields)}\n\n"
