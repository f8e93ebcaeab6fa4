"""A run on a model's own thread, and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from engine.errors import RuntimeFailed
from engine.events import Event
from engine.runtimes.common.thread_run import run_on_thread

WAIT_S = 10.0


class Unstoppable:
    """Computes until the test lets it end, whoever cancels it."""

    progress = 0

    def __init__(self) -> None:
        self.going, self.may_end = threading.Event(), threading.Event()
        self.ended = False

    def execute(self) -> None:
        self.going.set()
        self.may_end.wait(WAIT_S)
        self.ended = True

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_cancelled_run_is_awaited_however_often_it_is_cancelled(times: int) -> None:
    """The lease ends with the generator: before that the memory must be free."""
    run = Unstoppable()
    seen: list[bool] = []

    async def consume() -> None:
        events: AsyncGenerator[Event, None] = run_on_thread(
            thread, lambda _: run, lambda error: RuntimeFailed(str(error))
        )
        try:
            async with aclosing(events):
                async for _ in events:
                    pass
        finally:
            seen.append(run.ended)

    with ThreadPoolExecutor(1) as thread:
        consuming = asyncio.create_task(consume())
        await asyncio.to_thread(run.going.wait, WAIT_S)
        for _ in range(times):
            consuming.cancel()
            await asyncio.wait([consuming], timeout=0.01)
        assert not consuming.done()
        run.may_end.set()
        await asyncio.wait([consuming])
    assert consuming.cancelled()
    assert seen == [True]
