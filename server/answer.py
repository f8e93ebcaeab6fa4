"""The answer of a model to one request, as a stream of events or as a whole."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from typing import TYPE_CHECKING, TypeAlias

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError
from engine.events import Document, Event, Frame
from engine.requests import Request
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from server.errors import Failure
from server.headers import HEADER_PREFIX, HeldModels, answer_headers
from server.sse import EventStream

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long a request may wait before its response begins with status 200. An error before that
still has an HTTP status of its own."""

PROGRESS_INTERVAL_S = 1.0

Frames: TypeAlias = Callable[["Session"], AsyncGenerator[Event, None]]
"""The answer. Of its events the frames are sent. One without text begins the response."""

Render: TypeAlias = Callable[[Sequence[Event]], Awaitable[Response]]
"""Makes the response from all events of a session."""


async def whole_answer(
    engine: Engine, request: Request, render: Render, *, held: HeldModels | None = None
) -> Response:
    """Run the request to its end and make the response from its events.

    `held` says what the caller waited for before, to keep the models on the device.

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
    response.headers.update(answer_headers(session, ran_ms, held))
    return response


async def stream_answer(
    engine: Engine,
    request: Request,
    frames: Frames,
    send: Send,
    *,
    shows_wait: bool = True,
    held: HeldModels | None = None,
) -> Response | None:
    """Open a session for the request and send the frames of its answer.

    The response begins with the first frame. If the request still waits for its grant after
    `GRACE_S`, the response begins with comments: its position and its ETA. Clients skip comments.
    `shows_wait` is False for a client that may not expect them. `held` is as in `whole_answer`. An
    error after the response has
    begun is logged, and sent as the last event.

    Returns:
        The response to send instead, if the model gave a whole document.

    Raises:
        Exception: an error before the response began.

    """
    stream = EventStream(send)
    failed = False
    try:
        waiting = Waiting()
        shown = _ShownWait(engine, waiting, stream) if shows_wait else nullcontext()
        async with shown:
            session = await engine.open(request, waiting)
        try:
            headers = answer_headers(session, held=held)
            response = await _send_answer(session, frames, stream, headers)
        finally:
            # Before the last piece is sent: see run_while_connected.
            await session.close()
        if response is not None:
            return response
    except Exception as error:
        if not stream.begun:
            raise
        # The status is sent already, so the stream itself must report the error.
        expected = isinstance(error, EngineError)
        logger.error("stream %s failed: %s", request.request_id, error, exc_info=not expected)
        await stream.send(Failure.of(error).frame(request.operation, request.request_id))
        failed = True
    await stream.end(failed=failed)
    return None


async def _send_answer(
    session: Session, frames: Frames, stream: EventStream, headers: Mapping[str, str]
) -> Response | None:
    """Send what the session gives, or return it as a response."""
    if isinstance(session.first, Document) and not stream.begun:
        return Response(session.first.body, headers=dict(headers), media_type="application/json")
    if stream.begun:
        await stream.send(_granted_comment(headers))
    if isinstance(session.first, Document):
        # Comments about the wait have begun a stream: the document is its only event.
        await stream.send(f"data: {session.first.body.decode()}\n\n")
    async with aclosing(frames(session)) as answer:
        async for frame in answer:
            if isinstance(frame, Frame):
                if not stream.begun:
                    await stream.begin(headers)
                await stream.send(frame.data)
    return None


class _ShownWait:
    """Sends comments about the wait of a request, if it waits for longer than `GRACE_S`."""

    def __init__(self, engine: Engine, waiting: Waiting, stream: EventStream) -> None:
        self._engine = engine
        self._waiting = waiting
        self._stream = stream
        self._over = asyncio.Event()
        self._reporter: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(GRACE_S, self._begin)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._reporter is None:
            return
        if kind is asyncio.CancelledError:
            # The client reads no more, so a send under way may never complete.
            self._reporter.cancel()
        self._over.set()
        await self._reporter  # otherwise not cancelled: it may be in the middle of a head

    def _begin(self) -> None:
        self._reporter = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while not self._over.is_set():
            status = self._engine.wait_status(self._waiting)
            # Granted in time, its first event decides the kind of response.
            if status.stage is not Stage.RUNNING or self._stream.begun:
                await self._stream.begin({})
                await self._stream.send(f": {wait_words(status, self._waiting.model)}\n\n")
            with suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_INTERVAL_S):
                    await self._over.wait()


def wait_words(status: WaitStatus, model: str) -> str:
    """`queued position=3 eta=12.4s`, `loading llama eta=2.1s`."""
    words = [status.stage.value]
    if status.stage is Stage.QUEUED:
        words.append(f"position={status.position}")
    elif status.stage is not Stage.STARTING:
        words.append(model)
    if status.eta_s is not None:
        words.append(f"eta={status.eta_s:.1f}s")
    return " ".join(words)


def _granted_comment(headers: Mapping[str, str]) -> str:
    """The content of our headers, which were sent before it was known."""
    fields = (f"{name.removeprefix(HEADER_PREFIX)}={value}" for name, value in headers.items())
    return f": granted {' '.join(fields)}\n\n"
