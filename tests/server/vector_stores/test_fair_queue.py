"""Whose file is read next."""

from __future__ import annotations

import asyncio

from server.vector_stores.fair_queue import FairQueue


async def test_the_keys_take_turns() -> None:
    queue = FairQueue()
    for number in range(1000):
        queue.put("many", number)
    queue.put("one", 5000)
    queue.put("two", 6000)
    queue.put("one", 5001)
    assert [await queue.get() for _ in range(7)] == [0, 5000, 6000, 1, 5001, 2, 3]


async def test_who_waits_gets_what_comes() -> None:
    queue = FairQueue()
    left, waits = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    left.cancel()
    queue.put("one", 1)
    assert await asyncio.wait_for(waits, 60) == 1
