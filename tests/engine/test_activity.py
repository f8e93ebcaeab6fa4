"""When others last worked, which batches wait for."""

from __future__ import annotations

import asyncio
import math

import pytest

from engine.activity import Activity

LIMIT_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_gap_begins_when_the_last_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    slept: list[float] = []
    activity = Activity(clock)
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:  # somebody comes and goes meanwhile
            activity.begin()
            clock.now += 2
            activity.end("")
        else:
            clock.now += seconds
        await real_sleep(0)

    async with asyncio.timeout(LIMIT_S):
        await activity.idle_for(1e9)  # nobody was ever there
        activity.begin()
        activity.begin()
        waiting = asyncio.create_task(activity.idle_for(5))
        await real_sleep(0)
        activity.end("a")
        await real_sleep(0)
        assert activity.busy and not waiting.done()
        monkeypatch.setattr(asyncio, "sleep", sleep)
        activity.end("a")
        await waiting
    assert not activity.busy
    assert slept == [5, 5]


def test_each_model_has_a_time_of_its_own() -> None:
    clock = Clock()
    activity = Activity(clock)
    assert activity.unused_s("a") == math.inf
    for model in ("a", "b", ""):
        activity.begin()
        clock.now += 3
        activity.end(model)
    assert (activity.unused_s("a"), activity.unused_s("b")) == (6, 3)
    assert activity.unused_s("") == math.inf
