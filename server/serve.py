"""The process that serves: listening, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from server.app import create_app
from server.settings import ServerSettings
from server.start import Start

if TYPE_CHECKING:
    from engine.engine import Engine

FLUSH_S = 2
"""Seconds that connections get after the drain, to take what was already produced."""
KEEP_ALIVE_S = 75
"""Longer than the idle time of common load balancers (60 s): a server that closes first loses
the race against a request under way, which then fails for no visible reason."""
INTERRUPTED = 130


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers.

    Those close the listener before the drain, so that nobody could see `/ready` turn; and they
    raise the signal again at the end, so that an orderly stop would look like a kill.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none: `serve` does."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound and listening socket.

    Raises:
        OSError: the address is taken, unknown or forbidden.

    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def run(engine: Engine, settings: ServerSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return; a second Ctrl-C exits with 130.

    Raises:
        Exception: what kept the engine from starting.

    """
    start = Start(engine)
    config = uvicorn.Config(
        create_app(engine, settings, start),
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
        runner.run(_serve(_Server(config), start, listener, settings.drain_s))
    if start.error is not None:
        raise start.error


async def _serve(server: _Server, start: Start, listener: socket.socket, drain_s: float) -> None:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        waits = [asyncio.create_task(each.wait()) for each in (stop, start.failed)]
        await asyncio.wait((serving, *waits), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        try:
            if stop.is_set():
                # The listener stays open: probes see the drain, new requests a clean 503.
                await start.drain(drain_s)
        finally:
            server.should_exit = True
            await serving


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
