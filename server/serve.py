"""The process that serves: its listener, its signals, and its orderly end."""

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
from typing import TYPE_CHECKING, Any

import uvicorn

from engine.errors import ShuttingDown
from engine.memory.malloc import share_one_heap
from server.app import Application, create_app
from server.cors import allow_origins
from server.exit_codes import FAULT, INTERRUPTED
from server.http_protocol import http_protocol
from server.public_address import without_root_path
from server.settings import ServerSettings
from server.start import Start
from server.supervision.early_probes import EarlyProbes
from server.supervision.heartbeat import Heartbeat
from server.websocket.protocol import websocket_options

if TYPE_CHECKING:
    from engine.engine import Engine

FLUSH_S = 2
"""Seconds after the drain for clients to take what was already produced."""
KEEP_ALIVE_S = 75
"""Longer than the idle timeout of common load balancers (60 s). If the server closed first, a
request under way could meet a closed connection and fail for no visible reason."""
BEAT_S = 1.0
"""The interval of the heartbeat, which shows that the event loop runs."""
RESTART_S = 5.0
"""The `Retry-After` of requests that the process gives up."""

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers.

    uvicorn's handlers close the listener before the drain, so no probe could see `/ready` change.
    They also raise the signal again at the end, so an orderly stop would look like a kill.
    """

    def __init__(self, config: uvicorn.Config, early: EarlyProbes | None) -> None:
        super().__init__(config)
        self._early = early

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and take over the connections that came before."""
        await super().startup(sockets)
        if self._early is None:
            return
        loop = asyncio.get_running_loop()
        for connection in await asyncio.to_thread(self._early.stop):
            with contextlib.suppress(OSError):  # its client has left
                await loop.connect_accepted_socket(self._new_protocol, connection)

    def _new_protocol(self) -> asyncio.Protocol:
        """As uvicorn makes them."""
        protocol: Any = self.config.http_protocol_class
        made: asyncio.Protocol = protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none: `_serve` does."""
        yield


def run(
    engine: Engine,
    settings: ServerSettings,
    listener: socket.socket,
    heartbeat: Heartbeat | None = None,
    early: EarlyProbes | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return. A second Ctrl-C exits with 130.

    `heartbeat` goes to the supervisor, if there is one. `early` has answered probes until now, and
    its other connections are served as well. A process that can serve no request any
    more exits with 70. It unloads nothing then, as that needs what does not respond.

    Raises:
        Exception: the error that kept the engine from starting.

    """
    share_one_heap()
    start = Start(engine)
    app = create_app(engine, settings, start)
    config = uvicorn.Config(
        without_root_path(allow_origins(app, settings), settings),
        http=http_protocol(settings.write_timeout_s),
        lifespan="on",
        **websocket_options(settings.write_timeout_s, settings.max_websocket_message),
        log_config=None,
        access_log=False,  # RequestContext logs, with the request's id
        proxy_headers=False,  # `base_url` reads them, and uvicorn knows no host and no prefix
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        server = _Server(config, early)
        runner.run(_serve(server, engine, start, app, listener, settings, heartbeat))
        if start.cut_short and start.error is None:
            logger.info("stopped before it was ready")
            sys.stdout.flush()
            sys.stderr.flush()
            # Not the runner's end: that waits for the thread that imports, for a minute or more.
            os._exit(0)
    if start.error is not None:
        raise start.error
    logger.info("stopped")


async def _serve(
    server: _Server,
    engine: Engine,
    start: Start,
    app: Application,
    listener: socket.socket,
    settings: ServerSettings,
    heartbeat: Heartbeat | None,
) -> None:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        waits = [asyncio.create_task(each.wait()) for each in (stop, start.failed)]
        beside = [asyncio.create_task(_replace_if_lost(engine, start, app, settings, heartbeat))]
        if heartbeat is not None:
            beside.append(asyncio.create_task(_beat(engine, start, heartbeat)))
        await asyncio.wait((serving, *waits, *beside), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        try:
            for task in beside:
                if task.done():  # only a bug of ours ends it, and that must not pass unnoticed
                    task.result()
            if stop.is_set():
                logger.info("stopping: what runs has %g s to end", settings.drain_s)
                # The listener stays open: probes see the drain, and new requests get a clean 503.
                await start.drain(settings.drain_s)
        finally:
            server.should_exit = True
            await serving
            for task in beside:
                task.cancel()


async def _beat(engine: Engine, start: Start, heartbeat: Heartbeat) -> None:
    """Send heartbeats, which show that the event loop works, and with it the scheduler."""
    while True:
        ready = start.done.is_set()
        heartbeat.beat(ready=ready, residents=engine.wanted())
        if ready:
            await asyncio.sleep(BEAT_S)
            continue
        # Readiness is reported at once: from then on the limit of silence is shorter.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await start.done.wait()


async def _replace_if_lost(
    engine: Engine,
    start: Start,
    app: Application,
    settings: ServerSettings,
    heartbeat: Heartbeat | None,
) -> None:
    """End the process once it can serve no request any more. Jobs continue in the next one."""
    await start.done.wait()
    fault = await engine.wait_for_fault(settings.hang_s, settings.stall_s)
    logger.critical("this process must be replaced: %s", fault)
    faulthandler.dump_traceback(all_threads=True)
    if heartbeat is not None:
        heartbeat.report(fault)
    message = f"The server is being restarted: {fault}."
    with contextlib.suppress(TimeoutError):  # a client that does not read delays no other
        async with asyncio.timeout(FLUSH_S):
            await app.requests.give_up(ShuttingDown(message, retry_after_s=RESTART_S))
    sys.stderr.flush()
    # Not sys.exit: that waits for the thread that hangs.
    os._exit(FAULT)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Generator[None, None, None]:
    """Set `stop` at the first SIGINT or SIGTERM. A SIGINT after it ends the process."""
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            sys.stderr.flush()
            # Not sys.exit: that waits for native threads, and the loop may be stuck.
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
