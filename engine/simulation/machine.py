"""The modelled machine: loads, wakes, parks, unloads and runs take the seconds of the trace."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection
from enum import StrEnum

from engine.simulation.outcome import Move, Outcome, Transition, Visit
from engine.simulation.traces import Trace

ROUNDING_S = 1e-9
"""Runs with ends this close together end at the same time."""


class Tier(StrEnum):
    """Where the modelled machine has a model."""

    ABSENT = "absent"
    PARKED = "parked"
    RESIDENT = "resident"


class Machine:
    """The modelled machine, on a clock of its own: tiers, runs and transitions.

    It raises `RuntimeError` for what no machine could do: two transitions at a time, more bytes
    than there are, a run of a model that is not there, an eviction of a model that runs.

    Runs of all resident models go on side by side at full speed. A serial device is shared
    equally: each of n runs then goes on at 1/n of its speed. Transitions do not slow runs down.
    """

    def __init__(self, trace: Trace, *, serial_device: bool = False) -> None:
        self.now_s = 0.0
        self.tiers = dict.fromkeys(trace.models, Tier.ABSENT)
        self.copied: dict[str, int] = {}
        """Host bytes of each model that has a host copy. Only these models can be parked."""
        self.device_bytes = dict.fromkeys(trace.models, 0)
        self.working_bytes = 0
        self.runs: Counter[str] = Counter()
        self.last_used_s = dict.fromkeys(trace.models, 0.0)
        self.moving: str | None = None
        self._trace = trace
        self._serial_device = serial_device
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: dict[int, None] = {}
        """Indices of the waiting requests, in order of arrival."""
        self._head = -1
        """The oldest of them, or -1; `_head_since_s` is when it became the oldest."""
        self._head_since_s = 0.0
        self._left_s: dict[int, float] = {}
        self._ended_s: dict[int, float] = {}
        self._transitions: list[Transition] = []
        self._worst_overtake_s = 0.0
        # A run that begins at work w ends at work w + run_s. Work goes on with the clock, on a
        # serial device at 1/n of its pace.
        self._work_s = 0.0
        self._worked_at_s = 0.0
        self._ends: list[tuple[float, int, Callable[[], None]]] = []
        self._alarm = 0

    @property
    def free_bytes(self) -> int:
        """Unoccupied device bytes."""
        return self._trace.budget_bytes - sum(self.device_bytes.values()) - self.working_bytes

    @property
    def host_free_bytes(self) -> int:
        """Host bytes that no host copy occupies."""
        return self._trace.host_bytes - sum(self.copied.values())

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Call `act` when the clock reaches `when_s`."""
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._order), act))

    def play(self, arrive: Callable[[int], None]) -> None:
        """Let every request arrive, by its index, and run until no event is left."""

        def arrival(index: int) -> Callable[[], None]:
            def act() -> None:
                self._waiting[index] = None
                self._notice_head()
                arrive(index)

            return act

        for index, request in enumerate(self._trace.requests):
            self.at(request.at_s, arrival(index))
        while self._events:
            self.now_s, _, act = heapq.heappop(self._events)
            act()

    def outcome(self) -> Outcome:
        """The outcome of every measured request.

        Raises:
            RuntimeError: some request was neither served nor refused.

        """
        forgotten = len(self._trace.requests) - len(self._left_s)
        if forgotten:
            raise RuntimeError(f"{forgotten} requests were neither served nor refused")
        visits = tuple(
            Visit(request, self._left_s[index], self._ended_s.get(index))
            for index, request in enumerate(self._trace.requests)
            if request.at_s >= self._trace.measured_from_s
        )
        first_s = visits[0].request.at_s
        transitions = tuple(
            each for each in self._transitions if each.ended_s > first_s or each.began_s >= first_s
        )
        return Outcome(visits, transitions, self._worst_overtake_s)

    # Requests.

    def refuse(self, index: int) -> None:
        """Take a request out unserved."""
        self._leave(index)

    def start(self, index: int, done: Callable[[], None]) -> None:
        """Run a request on its resident model."""
        request = self._trace.requests[index]
        model = self._trace.models[request.model]
        if self.tiers[request.model] is not Tier.RESIDENT or self.moving == request.model:
            raise RuntimeError(f"{request.model!r} is not there to run on")
        if self.runs[request.model] >= model.max_concurrency:
            raise RuntimeError(f"{request.model!r} runs {model.max_concurrency} requests already")
        if request.working_bytes > self.free_bytes:
            raise RuntimeError(f"{request.working_bytes} working bytes do not fit")
        self._leave(index)
        self._notice_overtaken(index)
        self._work()
        self.working_bytes += request.working_bytes
        self.runs[request.model] += 1

        def ended() -> None:
            self._ended_s[index] = self.last_used_s[request.model] = self.now_s
            self.working_bytes -= request.working_bytes
            self.runs[request.model] -= 1
            done()

        heapq.heappush(self._ends, (self._work_s + request.run_s, next(self._order), ended))
        self._set_alarm()

    def _leave(self, index: int) -> None:
        del self._waiting[index]
        self._left_s[index] = self.now_s
        self._notice_head()

    def _notice_head(self) -> None:
        head = next(iter(self._waiting), -1)
        if head != self._head:
            self._head, self._head_since_s = head, self.now_s

    def _notice_overtaken(self, index: int) -> None:
        # While a model moves, the head loses nothing: only one can move at a time.
        if 0 <= self._head < index and self.moving is None:
            model = self._trace.requests[self._head].model
            if self.tiers[model] is not Tier.RESIDENT:
                overtaken_s = self.now_s - self._head_since_s
                self._worst_overtake_s = max(self._worst_overtake_s, overtaken_s)

    def _pace(self) -> float:
        return 1 / max(1, len(self._ends)) if self._serial_device else 1.0

    def _work(self) -> None:
        """Advance the work to the clock. Call it before the number of runs changes."""
        self._work_s += (self.now_s - self._worked_at_s) * self._pace()
        self._worked_at_s = self.now_s

    def _set_alarm(self) -> None:
        self._alarm += 1
        if not self._ends:
            return
        alarm = self._alarm

        def ring() -> None:
            if alarm == self._alarm:
                self._end_runs()

        self.at(self.now_s + (self._ends[0][0] - self._work_s) / self._pace(), ring)

    def _end_runs(self) -> None:
        self._work()
        ended = []
        while self._ends and self._ends[0][0] <= self._work_s + ROUNDING_S:
            ended.append(heapq.heappop(self._ends)[2])
        self._set_alarm()
        for each in ended:
            each()

    # Transitions.

    def load(self, name: str, done: Callable[[float], None]) -> None:
        """Bring an absent model in from disk; `done` gets the seconds that it took."""
        model = self._trace.models[name]
        self._need(name, Tier.ABSENT)
        if model.wake_s is not None and model.nbytes <= self.host_free_bytes:
            self.copied[name] = model.nbytes
        self._bring(Move.LOAD, name, model.nbytes, model.load_s, done)

    def wake(self, name: str, done: Callable[[float], None]) -> None:
        """Bring in, from the host copy, the blocks of a parked model that are off the device."""
        model = self._trace.models[name]
        self._need(name, Tier.PARKED)
        missing_bytes = model.nbytes - self.device_bytes[name]
        seconds = (model.wake_s or 0.0) * missing_bytes / max(1, model.nbytes)
        self._bring(Move.WAKE, name, missing_bytes, seconds, done)

    def park(self, name: str, blocks: Collection[str], done: Callable[[], None]) -> None:
        """Take blocks of a model that has a host copy off the device."""
        model = self._trace.models[name]
        if self.tiers[name] is Tier.ABSENT or name not in self.copied:
            raise RuntimeError(f"{name!r} has no host copy to be parked with")
        self._need(name, self.tiers[name])
        leaving_bytes = sum(model.blocks[block] for block in blocks)

        def parked() -> None:
            self.tiers[name] = Tier.PARKED
            self.device_bytes[name] -= leaving_bytes
            done()

        self._move(Move.PARK, name, leaving_bytes, model.park_s, parked)

    def unload(self, name: str, done: Callable[[], None]) -> None:
        """Unload a model, with its host copy."""
        if self.tiers[name] is Tier.ABSENT:
            raise RuntimeError(f"{name!r} is not there")
        self._need(name, self.tiers[name])

        def unloaded() -> None:
            self.tiers[name] = Tier.ABSENT
            self.device_bytes[name] = 0
            self.copied.pop(name, None)
            done()

        seconds = self._trace.models[name].unload_s
        self._move(Move.UNLOAD, name, self.device_bytes[name], seconds, unloaded)

    def _need(self, name: str, tier: Tier) -> None:
        if self.moving is not None:
            raise RuntimeError(f"{name!r} cannot move while {self.moving!r} does")
        if self.runs[name]:
            raise RuntimeError(f"{name!r} is in use")
        if self.tiers[name] is not tier:
            raise RuntimeError(f"{name!r} is {self.tiers[name]}, not {tier}")

    def _bring(
        self, move: Move, name: str, nbytes: int, seconds: float, done: Callable[[float], None]
    ) -> None:
        if nbytes > self.free_bytes:
            raise RuntimeError(f"{nbytes} bytes of {name!r} do not fit")
        self.device_bytes[name] += nbytes

        def arrived() -> None:
            self.tiers[name] = Tier.RESIDENT
            done(seconds)

        self._move(move, name, nbytes, seconds, arrived)

    def _move(
        self, move: Move, name: str, nbytes: int, seconds: float, done: Callable[[], None]
    ) -> None:
        began_s = self.now_s
        self.moving = name

        def ended() -> None:
            self.moving = None
            self._transitions.append(Transition(move, name, began_s, self.now_s, nbytes))
            done()

        self.at(self.now_s + seconds, ended)
