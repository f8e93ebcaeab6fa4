"""The log of events: numbered, bounded, and honest about what it lost."""

from __future__ import annotations

import asyncio

import pytest

from engine.scheduling.event_log import EventLog, Lost
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from tests.engine.scheduling.world import Clock

KEPT = 3


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> EventLog:
    return EventLog(clock, KEPT)


def happen(
    log: EventLog, kind: EventKind = EventKind.LOAD, model: str = "a", times: int = 1
) -> None:
    for _ in range(times):
        log.append(SchedulerEvent(kind, model, "why", 1, 2))


def models(log: EventLog, after: int) -> list[str]:
    return [logged.event.model for logged in log.after(after).events]


def test_events_are_numbered_and_dated_in_order(log: EventLog, clock: Clock) -> None:
    begin = log.last_id
    happen(log, model="a")
    clock.now += 5
    happen(log, EventKind.GRANT, "b")
    happen(log, model="c")
    page = log.after(begin)
    assert [logged.event.model for logged in page.events] == ["a", "b", "c"]
    assert [logged.id for logged in page.events] == [begin + 1, begin + 2, begin + 3]
    assert [logged.at for logged in page.events] == [100, 105, 105]
    assert (page.lost, page.last_id) == (None, log.last_id)


def test_reading_goes_on_after_an_id(log: EventLog) -> None:
    happen(log, model="a")
    seen = log.last_id
    happen(log, model="b")
    happen(log, EventKind.GRANT, "c")
    assert models(log, seen) == ["b", "c"]
    assert log.after(log.last_id).events == ()


def test_zero_is_before_all_events(log: EventLog) -> None:
    assert log.after(0).lost is None
    happen(log, times=2)
    page = log.after(0)
    assert (len(page.events), page.lost) == (2, None)


@pytest.mark.parametrize("kind", [EventKind.GRANT, EventKind.REFUSE])
def test_answers_do_not_push_out_what_moved(log: EventLog, kind: EventKind) -> None:
    begin = log.last_id
    happen(log, EventKind.UNLOAD, "moved")
    happen(log, kind, "asked", times=KEPT + 2)
    assert models(log, begin) == ["moved"] + ["asked"] * KEPT
    assert log.after(begin).lost == Lost(2)


def test_a_slow_reader_loses_the_oldest_and_is_told_how_many(log: EventLog) -> None:
    happen(log, model="seen")
    seen = log.last_id
    for model in "abcde":
        happen(log, model=model)
    assert models(log, seen) == ["c", "d", "e"]
    assert log.after(seen).lost == Lost(2)
    assert log.after(0).lost == Lost(3)


def test_the_id_of_an_earlier_process_gives_all_and_says_that_more_is_missing(clock: Clock) -> None:
    earlier = EventLog(clock, KEPT)
    happen(earlier, times=900)
    clock.now += 1
    later = EventLog(clock, KEPT)
    happen(later)
    for unknown in (earlier.last_id, later.last_id + 1):
        page = later.after(unknown)
        assert (len(page.events), page.lost) == (1, Lost(None))


async def test_waiting_ends_with_the_next_event(log: EventLog) -> None:
    happen(log)
    waits = asyncio.create_task(log.wait(log.last_id))
    await asyncio.sleep(0)
    assert not waits.done()
    happen(log)
    async with asyncio.timeout(5):
        assert await waits
        assert await log.wait(log.last_id - 1)  # it is there already


async def test_waiting_ends_when_the_log_is_closed(log: EventLog) -> None:
    happen(log)
    waits = asyncio.create_task(log.wait(log.last_id))
    await asyncio.sleep(0)
    log.close()
    async with asyncio.timeout(5):
        assert not await waits
        assert await log.wait(log.last_id - 1), "what came before the end was not given"
