"""The outcome of one policy on a trace: every request, every transition, and their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.requests import Priority
from engine.simulation.traces import TracedRequest


class Move(StrEnum):
    """A transition of a model."""

    LOAD = "load"
    WAKE = "wake"
    PARK = "park"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Transition:
    """One model that moved. Times are those of the trace."""

    move: Move
    model: str
    began_s: float
    ended_s: float
    nbytes: int
    """Device bytes that came or left."""

    @property
    def brings_in(self) -> bool:
        """Whether it is a swap-in."""
        return self.move in (Move.LOAD, Move.WAKE)


@dataclass(frozen=True, slots=True)
class Visit:
    """The outcome of one request. Times are those of the trace."""

    request: TracedRequest
    left_s: float
    """When the request was granted or refused."""
    ended_s: float | None
    """When the run ended; None: the request was refused."""

    @property
    def wait_s(self) -> float:
        """Arrival to grant or refusal."""
        return self.left_s - self.request.at_s


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds that the requests of one kind waited. Percentiles are by nearest rank."""

    count: int
    p50_s: float
    p95_s: float
    max_s: float

    @classmethod
    def of(cls, waits_s: Sequence[float]) -> Waits:
        """The figures of at least one wait."""
        ordered = sorted(waits_s)

        def rank(share: float) -> float:
            return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

        return cls(len(ordered), rank(0.5), rank(0.95), ordered[-1])


@dataclass(frozen=True, slots=True)
class HeadWait:
    """The longest wait of any request as the oldest of all waiting requests.

    Before that it waited for older requests. Under any policy without starvation that part depends
    only on the amount of work.
    """

    model: str
    since_s: float
    """When the request became the oldest."""
    wait_s: float
    transitions_s: float
    """The part of `wait_s` in which a model was moving."""

    @property
    def unmoved_s(self) -> float:
        """The part of `wait_s` in which no model was moving."""
        return self.wait_s - self.transitions_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one policy on the measured part of a trace."""

    visits: tuple[Visit, ...]
    """In order of arrival."""
    transitions: tuple[Transition, ...]
    """In order of their ends, without those that ended before the first arrival."""
    worst_overtake_s: float
    """How long a request had been the oldest when a later one was granted before it, at most.

    Counts only where that cost the oldest something: its model was not there, and no model was
    moving.
    """

    @property
    def makespan_s(self) -> float:
        """First arrival to the end of the last run."""
        ends = [visit.ended_s for visit in self.visits if visit.ended_s is not None]
        return max(ends, default=0.0) - self.visits[0].request.at_s

    @property
    def refused(self) -> int:
        """The number of requests that were refused."""
        return sum(visit.ended_s is None for visit in self.visits)

    @property
    def swaps(self) -> int:
        """The number of loads and wakes, with the first of each model."""
        return sum(each.brings_in for each in self.transitions)

    @property
    def bytes_moved(self) -> int:
        """Bytes brought onto the device; a model that leaves copies nothing."""
        return sum(each.nbytes for each in self.transitions if each.brings_in)

    def count(self, move: Move) -> int:
        """The number of transitions of one kind."""
        return sum(each.move is move for each in self.transitions)

    def waits(self) -> Waits:
        """The waits of all requests, refused ones included."""
        return Waits.of([visit.wait_s for visit in self.visits])

    def waits_by_kind(self) -> dict[tuple[str, Priority], Waits]:
        """The waits of the requests of each model and priority in the trace."""
        kinds: dict[tuple[str, Priority], list[float]] = {}
        for visit in self.visits:
            kind = (visit.request.model, visit.request.priority)
            kinds.setdefault(kind, []).append(visit.wait_s)
        return {kind: Waits.of(waits_s) for kind, waits_s in sorted(kinds.items())}

    def head_wait(self) -> HeadWait:
        """The longest wait at the head of the queue, compared by the part without transitions."""
        worst: HeadWait | None = None
        last_left_s = 0.0
        moves = sorted(self.transitions, key=lambda each: each.began_s)
        for visit in self.visits:
            since_s = max(visit.request.at_s, last_left_s)
            last_left_s = max(last_left_s, visit.left_s)
            wait_s = max(0.0, visit.left_s - since_s)
            if worst is not None and wait_s <= worst.unmoved_s:
                continue
            moving_s = sum(
                max(0.0, min(each.ended_s, visit.left_s) - max(each.began_s, since_s))
                for each in moves
            )
            head = HeadWait(visit.request.model, since_s, wait_s, moving_s)
            if worst is None or head.unmoved_s > worst.unmoved_s:
                worst = head
        if worst is None:
            raise ValueError("an outcome has visits")
        return worst
