"""What the scheduler did, kept for those who ask later and told to those who follow."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile

from engine.scheduling.scheduler_event import EventKind, SchedulerEvent

KEPT = 2000
"""Events kept of each of the two sorts; some 500 bytes each."""

_ANSWERS = frozenset({EventKind.GRANT, EventKind.REFUSE})


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One event, with its place in the log and its time."""

    id: int
    """Rises by one from event to event."""
    at: float
    """Unix seconds."""
    event: SchedulerEvent


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that were overwritten before the reader came to them."""

    count: int | None
    """None if they were those of an earlier process, and nobody knows how many."""


@dataclass(frozen=True, slots=True)
class Page:
    """Events in order, oldest first, and what is missing before them."""

    events: tuple[LoggedEvent, ...]
    lost: Lost | None
    last_id: int
    """Of the newest event there is; where a reader of this page goes on."""


class EventLog:
    """The last events, in memory. For one event loop.

    Grants and refusals are many, and would push out the few loads and evictions that explain them:
    each sort has a ring of its own, under one numbering. Who follows the log keeps nothing here but
    asks for what came after an id, so that a slow reader costs nothing: it misses what was
    overwritten, and is told how much.
    """

    def __init__(self, clock: Callable[[], float] = time.time, kept: int = KEPT) -> None:
        """Keep `kept` events of each sort; `clock` gives Unix seconds."""
        self._clock = clock
        # Milliseconds of the start: below 1000 events a second no id comes again after a restart,
        # so that a reader who goes on after an old id is not given the wrong events.
        self._last_id = self._origin = int(clock() * 1000)
        self._moves: deque[LoggedEvent] = deque(maxlen=kept)
        self._answers: deque[LoggedEvent] = deque(maxlen=kept)
        self._appended = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> int:
        """The id of the newest event; following after it gives only what comes."""
        return self._last_id

    def append(self, event: SchedulerEvent) -> None:
        """Keep an event and wake those who follow."""
        self._last_id += 1
        ring = self._answers if event.kind in _ANSWERS else self._moves
        ring.append(LoggedEvent(self._last_id, self._clock(), event))
        self._wake()

    def after(self, last_id: int) -> Page:
        """All that is kept of what came after the event `last_id`; 0 is before all events."""
        known = self._origin <= last_id <= self._last_id
        begin = last_id if known else self._origin
        events = tuple(merge(_newer(self._moves, begin), _newer(self._answers, begin), key=_id))
        overwritten = self._last_id - begin - len(events)
        lost = Lost(overwritten) if overwritten else None
        if not known and last_id:
            lost = Lost(None)
        return Page(events, lost, self._last_id)

    async def wait(self, last_id: int) -> bool:
        """Return True once there is an event after `last_id`, False if none will come."""
        while last_id == self._last_id:
            if self._closed:
                return False
            await self._appended.wait()
        return True

    def close(self) -> None:
        """Let those who follow end, once they have what there is."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._appended.set()
        self._appended = asyncio.Event()


def _id(event: LoggedEvent) -> int:
    return event.id


def _newer(ring: deque[LoggedEvent], last_id: int) -> list[LoggedEvent]:
    """Those after `last_id`, oldest first; looks at no others."""
    newest_first = takewhile(lambda event: event.id > last_id, reversed(ring))
    return list(newest_first)[::-1]
