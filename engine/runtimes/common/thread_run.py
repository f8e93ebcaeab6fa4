"""Runs that go on a model's own thread, as events on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from engine.errors import EngineError
from engine.events import Event
from engine.process.switches import quick_switches
from engine.process.watchdog import WATCHDOG, Work

Emit = Callable[[Event], None]
"""Gives an event to whoever waits for it; callable from any thread."""


class ThreadRun(Work, Protocol):
    """One request on one model, which counts what it gets done."""

    def execute(self) -> None:
        """Do the work, emitting events, on the model's thread; return early if cancelled."""

    def cancel(self) -> None:
        """Make `execute` return soon; nothing if it has. Called from any thread."""


async def run_on_thread(
    thread: ThreadPoolExecutor,
    make_run: Callable[[Emit], ThreadRun],
    translate: Callable[[Exception], EngineError],
    *,
    helpers: bool = False,
) -> AsyncGenerator[Event, None]:
    """The events of a run. Closing the generator cancels it, and returns once it has ended.

    With `helpers` the library computes on threads of its own while the model's thread waits.

    Raises:
        EngineError: what the run raised, put into words by `translate` if it was another error.

    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    run = make_run(emit)

    def execute() -> None:
        what = f"a run on {threading.current_thread().name}"
        with quick_switches(), WATCHDOG.watch(what, run, helpers=helpers):
            run.execute()

    done = loop.run_in_executor(thread, execute)
    done.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        done.result()
    except EngineError:
        raise
    except Exception as error:
        raise translate(error) from error
    finally:
        run.cancel()
        # The lease must not end before the memory is free. The caller may be cancelled again.
        while not done.done():
            await asyncio.shield(asyncio.wait([done]))
