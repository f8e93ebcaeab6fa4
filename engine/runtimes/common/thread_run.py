"""Runs on a model's own thread, whose events arrive on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from engine.errors import EngineError
from engine.events import Event
from engine.process.endings import wait_for_end
from engine.process.switches import quick_switches
from engine.process.watchdog import WATCHDOG, Work

Emit = Callable[[Event], None]
"""Passes an event to the consumer of the run. Any thread may call it."""


class ThreadRun(Work, Protocol):
    """One request on one model, which counts its progress."""

    def execute(self) -> None:
        """Do the work on the model's thread and emit events. Return early if cancelled."""

    def cancel(self) -> None:
        """Make `execute` return soon, if it has not. Any thread may call it."""


async def run_on_thread(
    thread: ThreadPoolExecutor,
    make_run: Callable[[Emit], ThreadRun],
    translate: Callable[[Exception], EngineError],
    *,
    helpers: bool = False,
) -> AsyncGenerator[Event, None]:
    """The events of a run. Closing the generator cancels the run and returns once it has ended.

    With `helpers` the library computes on its own threads while the model's thread waits.

    Raises:
        EngineError: what the run raised. `translate` has put any other error into words.

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
        # The lease must not end before the memory is free, even if the caller is cancelled again.
        await wait_for_end(done)
