"""The engine's own decisions on a modelled machine: hours of requests in milliseconds, no torch.

`simulate` drives the real `Scheduler`, and with it the real planner and `Ledger`, through a
trace. Only the machine is modelled (`Machine`): loads, wakes, parks, unloads and runs take the
seconds that the trace says. Other policies on the same machine are in `baselines.py` and
`clairvoyant.py`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError, Overloaded
from engine.memory.block import Block, Estimate
from engine.requests import Priority
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Ledger
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.ticket import Ticket
from engine.simulation.traces import Trace, TracedModel, TracedRequest

ROUNDING_S = 1e-9
"""Runs that end this close together end at once."""


class Tier(StrEnum):
    """Where a model of the modelled machine is."""

    ABSENT = "absent"
    PARKED = "parked"
    RESIDENT = "resident"


class Move(StrEnum):
    """A transition of a model."""

    LOAD = "load"
    WAKE = "wake"
    PARK = "park"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Transition:
    """One model that moved. Times are the trace's."""

    move: Move
    model: str
    began_s: float
    ended_s: float
    nbytes: int
    """That came onto the device, or left it."""

    @property
    def brings_in(self) -> bool:
        """It is a swap-in."""
        return self.move in (Move.LOAD, Move.WAKE)


@dataclass(frozen=True, slots=True)
class Visit:
    """What became of one request. Times are the trace's."""

    request: TracedRequest
    left_s: float
    """When it was granted or refused."""
    ended_s: float | None
    """When its run ended; None: it was refused."""

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
        """Of at least one wait."""
        ordered = sorted(waits_s)

        def rank(share: float) -> float:
            return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

        return cls(len(ordered), rank(0.5), rank(0.95), ordered[-1])


@dataclass(frozen=True, slots=True)
class HeadWait:
    """The longest that any request waited as the oldest of all that waited.

    What it waited before that, it waited for older ones, which under any policy that lets
    nobody starve is a matter of how much there is to do.
    """

    model: str
    since_s: float
    """When it became the oldest."""
    wait_s: float
    transitions_s: float
    """The part of it in which some model was moving."""

    @property
    def unmoved_s(self) -> float:
        """The part of it in which no model was moving."""
        return self.wait_s - self.transitions_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy made of the measured part of a trace."""

    visits: tuple[Visit, ...]
    """In order of arrival."""
    transitions: tuple[Transition, ...]
    """In order of their ends; those that were over at the first arrival are left out."""
    worst_overtake_s: float
    """For how long the oldest request had been the oldest when a later one was granted before it.

    Counted only where that cost it something: its model was not there, and nothing was moving.
    """

    @property
    def makespan_s(self) -> float:
        """First arrival to the end of the last run."""
        ends = [visit.ended_s for visit in self.visits if visit.ended_s is not None]
        return max(ends, default=0.0) - self.visits[0].request.at_s

    @property
    def refused(self) -> int:
        """Requests that were not served."""
        return sum(visit.ended_s is None for visit in self.visits)

    @property
    def swaps(self) -> int:
        """Loads and wakes, the first of each model too."""
        return sum(each.brings_in for each in self.transitions)

    @property
    def bytes_moved(self) -> int:
        """Onto the device; leaving copies nothing."""
        return sum(each.nbytes for each in self.transitions if each.brings_in)

    def count(self, move: Move) -> int:
        """How many transitions of one kind there were."""
        return sum(each.move is move for each in self.transitions)

    def waits(self) -> Waits:
        """Of all requests, refused ones too."""
        return Waits.of([visit.wait_s for visit in self.visits])

    def waits_by_kind(self) -> dict[tuple[str, Priority], Waits]:
        """Of the requests of each model and priority that occur."""
        kinds: dict[tuple[str, Priority], list[float]] = {}
        for visit in self.visits:
            kind = (visit.request.model, visit.request.priority)
            kinds.setdefault(kind, []).append(visit.wait_s)
        return {kind: Waits.of(waits_s) for kind, waits_s in sorted(kinds.items())}

    def head_wait(self) -> HeadWait:
        """The longest wait at the head of the queue, the part without transitions deciding."""
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


class Machine:
    """The modelled machine: what is where, what runs and what moves, on a clock of its own.

    It refuses what no machine could do, with `RuntimeError`: two transitions at a time, more
    bytes than there are, a run of a model that is not there, an eviction of one that runs.
    Runs of all resident models go on side by side at full speed, or, on a serial device,
    share it equally: of n runs each then goes on at 1/n of its speed. Transitions do not slow
    runs down.
    """

    def __init__(self, trace: Trace, *, serial_device: bool = False) -> None:
        self.now_s = 0.0
        self.tiers = dict.fromkeys(trace.models, Tier.ABSENT)
        self.copied: dict[str, int] = {}
        """Host bytes of each model that has a host copy; only these can be parked."""
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
        """Indices of those that wait, in order of arrival."""
        self._head = -1
        """The oldest of them, and since when it is."""
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
        """What nothing occupies."""
        return self._trace.budget_bytes - sum(self.device_bytes.values()) - self.working_bytes

    @property
    def host_free_bytes(self) -> int:
        """What no host copy occupies."""
        return self._trace.host_bytes - sum(self.copied.values())

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Call `act` when the clock gets there."""
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._order), act))

    def play(self, arrive: Callable[[int], None]) -> None:
        """Let every request arrive, by its index, and go on until nothing is left to happen."""

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
        """What became of every request.

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
        """A request goes away unserved."""
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
        """Bring the work done up to the clock; before the number of runs changes."""
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
        """Bring an absent model in from disk; `done` learns the seconds it took."""
        model = self._trace.models[name]
        self._need(name, Tier.ABSENT)
        if model.wake_s is not None and model.nbytes <= self.host_free_bytes:
            self.copied[name] = model.nbytes
        self._bring(Move.LOAD, name, model.nbytes, model.load_s, done)

    def wake(self, name: str, done: Callable[[float], None]) -> None:
        """Bring in from the host copy whatever of a parked model is not on the device."""
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
        """Take a model out, its host copy too."""
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


def simulate(trace: Trace, policy: EngineConfig, *, serial_device: bool = False) -> Outcome:
    """Let the real scheduler serve a trace, with the limits of `policy`.

    Of the models of `policy`, those that the trace names too give their `keep_alive` and `pin`.
    Requests of the trace wait for as long as their own timeout says.

    Raises:
        RuntimeError: a promise was broken (see `Machine`).

    """
    machine = Machine(trace, serial_device=serial_device)
    turntable = _Turntable(trace, policy, machine)
    machine.play(turntable.arrive)
    return machine.outcome()


def usual_config(trace: Trace) -> EngineConfig:
    """The usual limits, for the models of a trace."""
    models = tuple(ModelConfig(id=name, source="trace") for name in trace.models)
    return EngineConfig(models=models)


def _config(trace: Trace, policy: EngineConfig) -> EngineConfig:
    """The limits of `policy`, for the models of a trace."""
    known = {model.id: model for model in policy.models}
    usual = usual_config(trace)
    models = tuple(known.get(model.id, model) for model in usual.models)
    return policy.model_copy(update={"models": models})


class _Turntable:
    """The scheduler's hands on a modelled machine, and its clients."""

    def __init__(self, trace: Trace, policy: EngineConfig, machine: Machine) -> None:
        self._trace = trace
        self._machine = machine
        self._alarm = 0
        self._scheduler = Scheduler(
            _config(trace, policy),
            Ledger(budget_bytes=trace.budget_bytes, total_bytes=trace.budget_bytes),
            self,
            lambda: machine.now_s,
        )

    # The effects.

    def estimate(self, model_id: str) -> None:
        model = self._trace.models[model_id]
        estimate = Estimate(_blocks(model, parkable=model.wake_s is not None), model.load_s)
        self._machine.at(
            self._machine.now_s, lambda: self._scheduler.on_estimate(model_id, estimate)
        )

    def prefetch(self, model_id: str) -> None:
        """Files read ahead save nothing here: a load takes what the trace says."""

    def load(self, model_id: str) -> None:
        model = self._trace.models[model_id]

        def loaded(seconds: float) -> None:
            copy_bytes = self._machine.copied.get(model_id, 0)
            blocks = _blocks(model, parkable=model_id in self._machine.copied)
            self._scheduler.on_loaded(model_id, blocks, seconds, model.max_concurrency, copy_bytes)

        self._machine.load(model_id, loaded)

    def unload(self, model_id: str, reason: str) -> None:  # noqa: ARG002 - for a log
        self._machine.unload(model_id, lambda: self._scheduler.on_unloaded(model_id))

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:  # noqa: ARG002
        self._machine.park(model_id, blocks, lambda: self._scheduler.on_parked(model_id))

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:  # noqa: ARG002 - all of them
        self._machine.wake(model_id, lambda s: self._scheduler.on_woken(model_id, s))

    def measure_external(self) -> int:
        return 0

    def host_free_bytes(self) -> int:
        return self._machine.host_free_bytes

    def call_at(self, when: float) -> None:
        self._alarm += 1
        alarm = self._alarm

        def ring() -> None:
            if alarm == self._alarm:
                self._scheduler.on_timer()

        self._machine.at(when, ring)

    # The clients.

    def arrive(self, index: int) -> None:
        """Ask for a request, by its index in the trace."""
        request = self._trace.requests[index]

        def granted(lease: Lease) -> None:
            self._machine.start(index, lease.release)

        def refused(_: EngineError) -> None:
            self._machine.refuse(index)

        ticket = Ticket(
            request_id=str(index),
            model_id=request.model,
            operation="simulated",
            working_bytes=request.working_bytes,
            priority=request.priority,
            timeout_s=request.timeout_s,
            on_granted=granted,
            on_refused=refused,
        )
        try:
            self._scheduler.on_request(ticket)
        except Overloaded as error:
            refused(error)


def _blocks(model: TracedModel, *, parkable: bool) -> tuple[Block, ...]:
    return tuple(Block(name, nbytes, parkable) for name, nbytes in model.blocks.items())
