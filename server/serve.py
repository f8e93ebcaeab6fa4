"""The process that serves: listening, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from engine.errors import ShuttingDown
from server.app import create_app
from server.open_requests import OpenRequests
from server.settings import ServerSettings
from server.start import Start
from server.supervision.heartbeat import Heartbeat

if TYPE_CHECKING:
    from engine.engine import Engine

FLUSH_S = 2
"""Seconds that connections get after the drain, to take what was already produced."""
KEEP_ALIVE_S = 75
"""Longer than the idle time of common load balancers (60 s): a server that closes first loses
the race against a request under way, which then fails for no visible reason."""
INTERRUPTED = 130
FAULT = 70
"""Exit status of a process that can serve nobody any more (sysexits.h: EX_SOFTWARE)."""
BEAT_S = 1.0
"""How often the supervisor is told that the event loop still turns."""
RESTART_S = 5.0
"""When clients whose request is given up are told to come again."""

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers.

    Those close the listener before the drain, so that nobody could see `/ready` turn; and they
    raise the signal again at the end, so that an orderly stop would look like a kill.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none: `serve` does."""
        yield


def run(
    engine: Engine,
    settings: ServerSettings,
    listener: socket.socket,
    line: Heartbeat | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return; a second Ctrl-C exits with 130.

    `line` leads to the supervisor, where there is one. A process that can serve nobody any more
    exits with 70: nothing is unloaded then, as that would need what does not answer.

    Raises:
        Exception: what kept the engine from starting.

    """
    start = Start(engine)
    requests = OpenRequests(create_app(engine, settings, start))
    config = uvicorn.Config(
        requests,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,  # RequestContext logs, with the request's id
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Server(config), engine, start, requests, listener, settings, line))
    if start.error is not None:
        raise start.error


async def _serve(
    server: _Server,
    engine: Engine,
    start: Start,
    requests: OpenRequests,
    listener: socket.socket,
    settings: ServerSettings,
    line: Heartbeat | None,
) -> None:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        waits = [asyncio.create_task(each.wait()) for each in (stop, start.failed)]
        beside = [asyncio.create_task(_replace_if_lost(engine, start, requests, settings, line))]
        if line is not None:
            beside.append(asyncio.create_task(_beat(engine, start, line)))
        await asyncio.wait((serving, *waits, *beside), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        try:
            for task in beside:
                if task.done():  # by a mistake of ours alone, and that must not pass unnoticed
                    task.result()
            if stop.is_set():
                # The listener stays open: probes see the drain, new requests a clean 503.
                await start.drain(settings.drain_s)
        finally:
            server.should_exit = True
            await serving
            for task in beside:
                task.cancel()


async def _beat(engine: Engine, start: Start, line: Heartbeat) -> None:
    """Tell the supervisor again and again that the event loop, and with it the scheduler, works."""
    while True:
        ready = start.done.is_set()
        line.beat(ready=ready, residents=engine.wanted())
        if ready:
            await asyncio.sleep(BEAT_S)
            continue
        # That it is ready is told at once: from then on it may be silent for less long.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await start.done.wait()


async def _replace_if_lost(
    engine: Engine,
    start: Start,
    requests: OpenRequests,
    settings: ServerSettings,
    line: Heartbeat | None,
) -> None:
    """End the process once no request can be served with it any more; jobs go on in the next."""
    await start.done.wait()
    fault = await engine.wait_for_fault(settings.hang_s, settings.stall_s)
    logger.critical("this process must be replaced: %s", fault)
    faulthandler.dump_traceback(all_threads=True)
    if line is not None:
        line.report(fault)
    message = f"The server is being restarted: {fault}."
    with contextlib.suppress(TimeoutError):  # a client that reads nothing keeps nobody
        async with asyncio.timeout(FLUSH_S):
            await requests.give_up(ShuttingDown(message, retry_after_s=RESTART_S))
    sys.stderr.flush()
    # Not sys.exit: the thread that hangs would be waited for.
    os._exit(FAULT)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Generator[None, None, None]:
    """Set `stop` at the first SIGINT or SIGTERM; leave the process at a SIGINT after it."""
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            sys.stderr.flush()
            # Not sys.exit: native threads would be waited for, and the loop may be stuck.
            os._exit(INTERRUPTED)
        asked = True
        loop.call_soon_threadsafe(stop.set)

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
