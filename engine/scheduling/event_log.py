"""The log of scheduler events: read later by id, or followed as they come."""

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
"""Events kept of each of the two kinds (moves, answers); some 500 bytes each."""

_ANSWERS = frozenset({EventKind.GRANT, EventKind.REFUSE})


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One event, with its id and its time."""

    id: int
    """One higher than that of the event before."""
    at: float
    """Unix seconds."""
    event: SchedulerEvent


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that were overwritten before the reader read them."""

    count: int | None
    """None if they belong to an earlier process: their number is unknown."""


@dataclass(frozen=True, slots=True)
class Page:
    """Events, oldest first, and what is missing before them."""

    events: tuple[LoggedEvent, ...]
    lost: Lost | None
    last_id: int
    """Of the newest event; the reader of this page goes on after it."""


class EventLog:
    """The last events, in memory. For one event loop.

    Grants and refusals are many. In one ring they would push out the few loads and evictions
    that explain them, so each kind has a ring of its own, under one numbering. A reader that
    follows the log has no state here: it asks for the events after an id. A slow reader
    therefore costs nothing. It misses what was overwritten, and gets the number of those.
    """

    def __init__(self, clock: Callable[[], float] = time.time, kept: int = KEPT) -> None:
        """Keep `kept` events of each sort; `clock` gives Unix seconds."""
        self._clock = clock
        # Milliseconds of the start: below 1000 events a second no id comes again after a restart.
        # A reader that goes on after an old id would otherwise get the wrong events.
        self._last_id = self._origin = int(clock() * 1000)
        self._moves: deque[LoggedEvent] = deque(maxlen=kept)
        self._answers: deque[LoggedEvent] = deque(maxlen=kept)
        self._appended = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> int:
        """The id of the newest event; a reader that follows after it gets only new events."""
        return self._last_id

    def append(self, event: SchedulerEvent) -> None:
        """Keep an event and wake the readers."""
        self._last_id += 1
        ring = self._answers if event.kind in _ANSWERS else self._moves
        ring.append(LoggedEvent(self._last_id, self._clock(), event))
        self._wake()

    def after(self, last_id: int) -> Page:
        """All kept events after the event `last_id`; 0 is before all events."""
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
        """Let readers end once they have read all events."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._appended.set()
        self._appended = asyncio.Event()


def _id(event: LoggedEvent) -> int:
    return event.id


def _newer(ring: deque[LoggedEvent], last_id: int) -> list[LoggedEvent]:
    """The events after `last_id`, oldest first; reads no others."""
    newest_first = takewhile(lambda event: event.id > last_id, reversed(ring))
    return list(newest_first)[::-1]
