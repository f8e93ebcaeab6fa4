"""The engine's promises, kept by the real scheduler in simulated worlds.

A world is a discrete-event simulation: requests arrive, run and are cancelled,
loads take time and fail, other programs come and go. Its clock jumps from event
to event, so hours pass in milliseconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError, LoadFailed
from engine.memory.block import Block, Estimate
from engine.requests import Priority
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Change, Ledger
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.scheduling.ticket import Ticket
from engine.status import ModelState
from tests.engine.scheduling.world import Clock, config

CAPACITY_BYTES = 100
OVERTAKE_S = 10.0
MOST_STEPS = 20_000


@dataclass(frozen=True)
class SimulatedModel:
    """How a model behaves; its real size may differ from what is estimated."""

    id: str
    nbytes: int
    estimated_bytes: int
    load_s: float
    unload_s: float
    concurrency: int
    parkable: float = 0.0
    """Share of its bytes that can be parked; what is left only unloading gives back."""
    wake_s: float = 0.0

    def blocks(self) -> tuple[Block, ...]:
        """Two that can be parked, one that cannot."""
        parkable_bytes = int(self.nbytes * self.parkable)
        scratch_bytes = parkable_bytes // 3
        return (
            Block("weights", parkable_bytes - scratch_bytes, parkable=True),
            Block("kv_cache", scratch_bytes, parkable=True, scratch=True),
            Block("rest", self.nbytes - parkable_bytes),
        )


@dataclass(frozen=True)
class Arrival:
    """A request that comes, and what it will do."""

    at: float
    model: str
    run_s: float
    working_bytes: int = 0
    priority: Priority = Priority.NORMAL
    timeout_s: float = math.inf
    cancel_after_s: float | None = None
    exclusive: bool = False
    keeps: tuple[str, ...] | None = None
    """A session, which keeps these models beside the first; None: a request."""


@dataclass(eq=False)
class Visit:
    """One arrival as it goes."""

    arrival: Arrival
    number: int
    ticket: Ticket = field(init=False)
    outcome: str = "waiting"
    granted_at: float | None = None


class World:
    """Effects and clients around a real scheduler; checks the promises at every event."""

    def __init__(
        self,
        models: list[SimulatedModel],
        *,
        failing_loads: frozenset[int] = frozenset(),
        max_overtake_s: float = OVERTAKE_S,
        host_bytes: int = 2 * CAPACITY_BYTES,
    ) -> None:
        self.clock = Clock(0.0)
        self.models = {model.id: model for model in models}
        self.failing_loads = failing_loads
        self.ledger = Ledger(budget_bytes=CAPACITY_BYTES, total_bytes=CAPACITY_BYTES)
        self.external_bytes = 0
        self.loads = 0
        self.unloads = 0
        self.parks = 0
        self.wakes = 0
        self.host_bytes = host_bytes
        self.host_copies: dict[str, int] = {}
        self.parked: dict[str, set[str]] = {model.id: set() for model in models}
        self.moving: str | None = None
        self.loaded_at: dict[str, float] = {}
        self.running: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        """Sessions that keep each model."""
        self.alone = False
        self.draining = False
        self.visits: list[Visit] = []
        self.on_grant: Callable[[Visit], None] = lambda visit: None
        self.after_step: Callable[[], None] = lambda: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._alarm = 0
        self.scheduler = Scheduler(
            config(
                [model.id for model in models],
                max_overtake_s=max_overtake_s,
                keep_alive=300.0,
            ),
            self.ledger,
            self,
            self.clock,
            on_event=self._check_ledger,
        )

    # The effects.

    def estimate(self, model_id: str) -> None:
        size = Estimate((Block("weights", self.models[model_id].estimated_bytes),), 1.0)
        self.after(0.1, lambda: self.scheduler.on_estimate(model_id, size))

    def prefetch(self, model_id: str) -> None:
        assert model_id not in self.loaded_at

    def load(self, model_id: str) -> None:
        assert self.moving is None, "two transitions at a time"
        self.moving = model_id
        model = self.models[model_id]
        fails = self.loads in self.failing_loads
        self.loads += 1

        def done() -> None:
            self.moving = None
            if fails:
                self.scheduler.on_load_failed(model_id, LoadFailed("simulated"))
            else:
                self.loaded_at[model_id] = self.clock.now
                blocks = model.blocks()
                copy_bytes = min(self.host_free_bytes(), blocks[0].nbytes)
                self.host_copies[model_id] = copy_bytes if copy_bytes == blocks[0].nbytes else 0
                if not self.host_copies[model_id]:
                    blocks = (Block("weights", model.nbytes),)
                self.scheduler.on_loaded(
                    model_id, blocks, model.load_s, model.concurrency, self.host_copies[model_id]
                )

        self.after(model.load_s, done)

    def unload(self, model_id: str, reason: str) -> None:
        assert self.moving is None, "two transitions at a time"
        assert self.running[model_id] == 0, "a leased model was evicted"
        assert self.held[model_id] == 0 or self.draining, "a model that a session keeps was evicted"
        self.moving = model_id
        self.unloads += 1

        def done() -> None:
            self.moving = None
            del self.loaded_at[model_id]
            self.host_copies[model_id] = 0
            self.parked[model_id] = set()
            self.scheduler.on_unloaded(model_id)

        self.after(self.models[model_id].unload_s, done)

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:
        assert self.moving is None, "two transitions at a time"
        assert self.running[model_id] == 0, "a leased model was parked"
        assert self.held[model_id] == 0, "a model that a session keeps was parked"
        assert blocks and self.parked[model_id].isdisjoint(blocks)
        self.moving = model_id
        self.parks += 1

        def done() -> None:
            self.moving = None
            self.parked[model_id] |= blocks
            self.scheduler.on_parked(model_id)

        self.after(0.0, done)

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:
        assert self.moving is None, "two transitions at a time"
        assert blocks == self.parked[model_id]
        self.moving = model_id
        model = self.models[model_id]
        fails = self.wakes in self.failing_loads
        self.wakes += 1

        def done() -> None:
            self.moving = None
            if fails:
                self.scheduler.on_wake_failed(model_id, LoadFailed("simulated"))
            else:
                self.parked[model_id] = set()
                self.loaded_at[model_id] = self.clock.now
                self.scheduler.on_woken(model_id, model.wake_s)

        self.after(model.wake_s, done)

    def host_free_bytes(self) -> int:
        return self.host_bytes - sum(self.host_copies.values())

    def measure_external(self) -> int:
        assert self.moving is None, "measured while bytes were moving"
        return self.external_bytes

    def call_at(self, when: float) -> None:
        assert when > self.clock.now, "an alarm in the past would ring for ever"
        self._alarm += 1
        alarm = self._alarm

        def ring() -> None:
            if alarm == self._alarm:
                self.scheduler.on_timer()

        self.after(when - self.clock.now, ring)

    # The clients.

    def arrive(self, arrival: Arrival) -> None:
        visit = Visit(arrival, len(self.visits))
        self.visits.append(visit)

        def granted(lease: Lease) -> None:
            assert visit.outcome == "waiting", "answered twice, or after it was cancelled"
            visit.outcome = "granted"
            visit.granted_at = self.clock.now
            assert self.clock.now >= arrival.at
            for name in visit.ticket.models:
                assert name in self.loaded_at, "granted on a model that is not there"
                assert not self.parked[name], "granted on a model that is parked"
            if arrival.keeps is not None:
                self.held.update(visit.ticket.models)
                self.after(arrival.run_s, lambda: release(lease))
                return
            self.running[arrival.model] += 1
            assert self.running[arrival.model] <= self.models[arrival.model].concurrency
            assert not self.alone, "granted beside an exclusive lease"
            self.alone = arrival.exclusive
            assert not self.alone or self.running.total() == 1, "exclusive, but not alone"
            self.on_grant(visit)
            self.after(arrival.run_s, lambda: release(lease))

        def release(lease: Lease) -> None:
            if arrival.keeps is not None:
                self.held.subtract(visit.ticket.models)
            else:
                self.running[arrival.model] -= 1
            if arrival.exclusive:
                self.alone = False
            lease.release()

        def refused(error: EngineError) -> None:
            assert visit.outcome == "waiting"
            visit.outcome = error.code

        def cancel() -> None:
            if visit.outcome == "waiting":
                visit.outcome = "cancelled"
            self.scheduler.on_cancel(visit.ticket)

        visit.ticket = Ticket(
            request_id=f"r{visit.number}",
            model_id=arrival.model,
            operation="chat",
            working_bytes=arrival.working_bytes,
            priority=arrival.priority,
            timeout_s=arrival.timeout_s,
            exclusive=arrival.exclusive,
            hold=arrival.keeps is not None,
            further_models=arrival.keeps or (),
            on_granted=granted,
            on_refused=refused,
        )
        try:
            self.scheduler.on_request(visit.ticket)
        except LoadFailed as error:
            visit.outcome = error.code
            return
        if arrival.cancel_after_s is not None:
            self.after(arrival.cancel_after_s, cancel)

    # Time.

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + delay_s, next(self._order), act))

    def set_external(self, nbytes: int) -> None:
        self.external_bytes = nbytes

    def run(self) -> None:
        """Go on until nothing is left to happen."""
        for _ in range(MOST_STEPS):
            if not self._events:
                return
            when, _, act = heapq.heappop(self._events)
            self.clock.now = max(self.clock.now, when)
            act()
            self.after_step()
        pytest.fail("the world never comes to rest")

    def run_and_empty(self) -> None:
        """Go on to the end, shut down, and check that nothing is left behind."""
        self.run()
        waiting = [visit for visit in self.visits if visit.outcome == "waiting"]
        assert not waiting, "neither granted, refused nor cancelled"
        assert self.scheduler.report.queue() == ()
        self.draining = True
        self.scheduler.on_drain()
        self.run()
        assert self.scheduler.empty
        assert self.ledger.granted_bytes == 0
        assert self.ledger.status().entries == ()
        assert not self.loaded_at and not +self.running and not +self.held

    def _check_ledger(self, event: SchedulerEvent) -> None:
        if event.kind in (EventKind.GRANT, EventKind.LOAD, EventKind.LOADED):
            newest = self.ledger.history[-1]
            if newest.change is Change.GROW:
                assert newest.granted_bytes <= newest.capacity_bytes, event


def add_arrivals(world: World, arrivals: list[Arrival]) -> None:
    for arrival in arrivals:
        world.after(arrival.at, lambda arrival=arrival: world.arrive(arrival))  # type: ignore[misc]


# Any world.

durations_s = st.sampled_from([0.0, 0.5, 1.0, 3.0, 8.0, 20.0])


@st.composite
def simulated_models(draw: st.DrawFn, /, **fixed: Any) -> list[SimulatedModel]:
    models = []
    for model_id in ["a", "b", "c", "d", "e"][: draw(st.integers(2, 5))]:
        nbytes = draw(fixed.get("nbytes", st.integers(5, 95)))
        models.append(
            SimulatedModel(
                id=model_id,
                nbytes=nbytes,
                estimated_bytes=max(0, nbytes + draw(fixed.get("error", st.integers(-40, 10)))),
                load_s=draw(durations_s),
                unload_s=draw(st.sampled_from([0.0, 0.5, 2.0])),
                concurrency=draw(st.integers(1, 4)),
                parkable=draw(fixed.get("parkable", st.sampled_from([0.0, 0.6, 1.0]))),
                wake_s=draw(st.sampled_from([0.0, 0.1, 1.0])),
            )
        )
    return models


@st.composite
def arrivals_for(
    draw: st.DrawFn, models: list[SimulatedModel], *, plain: bool = False
) -> list[Arrival]:
    """Requests for these models; plain ones wait for ever and run beside each other.

    Beside those that are not plain there are sessions.
    """
    arrivals = []
    at = 0.0
    for _ in range(draw(st.integers(1, 40))):
        at += draw(st.sampled_from([0.0, 0.0, 0.2, 1.0, 4.0, 15.0]))
        model = draw(st.sampled_from(models))
        if not plain and draw(st.integers(0, 7)) == 7:
            others = [each.id for each in models if each is not model]
            keeps = draw(st.lists(st.sampled_from(others), unique=True, max_size=2))
            arrivals.append(
                Arrival(
                    at=at,
                    model=model.id,
                    run_s=draw(st.sampled_from([0.0, 8.0, 60.0])),
                    priority=draw(st.sampled_from(Priority)),
                    timeout_s=draw(st.sampled_from([math.inf, 5.0, 60.0])),
                    cancel_after_s=draw(st.sampled_from([None, None, 0.0, 2.0])),
                    keeps=tuple(keeps),
                )
            )
            continue
        arrivals.append(
            Arrival(
                at=at,
                model=model.id,
                run_s=draw(durations_s),
                working_bytes=draw(st.sampled_from([0, 0, 3, 10]))
                if plain
                else draw(st.integers(0, 30)),
                priority=draw(st.sampled_from(Priority)),
                timeout_s=math.inf if plain else draw(st.sampled_from([math.inf, 5.0, 60.0])),
                cancel_after_s=None
                if plain
                else draw(st.sampled_from([None, None, None, 0.0, 2.0, 20.0])),
                exclusive=not plain and draw(st.integers(0, 15)) == 15,
            )
        )
    return arrivals


@given(st.data())
def test_every_promise_holds_in_any_world(data: st.DataObject) -> None:
    models = data.draw(simulated_models())
    arrivals = data.draw(arrivals_for(models))
    failing = data.draw(st.frozensets(st.integers(0, 8), max_size=4))
    host_bytes = data.draw(st.sampled_from([0, 50, 200]))
    world = World(models, failing_loads=failing, host_bytes=host_bytes)
    add_arrivals(world, arrivals)
    foreign = data.draw(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 110)), max_size=4))
    for at, nbytes in foreign:
        world.after(at, lambda nbytes=nbytes: world.set_external(nbytes))  # type: ignore[misc]
    world.after(200.0, lambda: world.set_external(0))
    world.run_and_empty()
    # Each load served someone, failed, took more than estimated, or lost those it was for;
    # only the coming and going of other programs can undo one more.
    assert world.loads <= 2 * len(arrivals) + 2 * len(models) + len(foreign)


# No request is overtaken for long.


@given(st.data())
def test_nobody_is_overtaken_beyond_the_bound_where_models_exclude_each_other(
    data: st.DataObject,
) -> None:
    """Every model needs all the room, so any grant keeps the others' requests waiting."""
    # A part of a parked model that is still there may leave no room for the working memory of one
    # request, while others of its model have room: not what this is about.
    models = data.draw(
        simulated_models(nbytes=st.integers(60, 70), error=st.just(0), parkable=st.just(0.0))
    )
    world = World(models)

    def on_grant(visit: Visit) -> None:
        model_id = visit.arrival.model
        for other in world.visits[: visit.number]:
            if other.outcome == "waiting" and other.arrival.model != model_id:
                began_at = max(other.arrival.at, world.loaded_at[model_id])
                assert world.clock.now < began_at + OVERTAKE_S + 1e-9, (other, visit)

    world.on_grant = on_grant
    add_arrivals(world, data.draw(arrivals_for(models, plain=True)))
    world.run_and_empty()
    assert all(visit.outcome == "granted" for visit in world.visits)


@given(st.data())
def test_the_oldest_request_is_served_within_a_bound(data: st.DataObject) -> None:
    """Once overdue and oldest, it waits for what runs, what moves, and one turn of another."""
    models = data.draw(simulated_models(nbytes=st.integers(5, 90), error=st.just(0)))
    arrivals = data.draw(arrivals_for(models, plain=True))
    world = World(models)
    bound_s = (
        OVERTAKE_S
        + 2 * max(arrival.run_s for arrival in arrivals)
        + 2 * max(model.load_s for model in models)
        + sum(model.unload_s for model in models)
        + 1.0
    )
    oldest: list[tuple[Visit, float]] = []

    def after_step() -> None:
        waiting = next((v for v in world.visits if v.outcome == "waiting"), None)
        if oldest and oldest[0][0] is not waiting:
            visit, since = oldest.pop()
            assert (visit.granted_at or world.clock.now) - since <= bound_s, visit
        if waiting is not None and not oldest:
            since = max(world.clock.now, waiting.arrival.at + OVERTAKE_S)
            oldest.append((waiting, since))

    world.after_step = after_step
    add_arrivals(world, arrivals)
    world.run_and_empty()
    assert all(visit.outcome in ("granted", "insufficient_capacity") for visit in world.visits)


@pytest.mark.parametrize("load_s", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_models_that_do_not_fit_together_share_the_device_under_load(
    names: str, load_s: float
) -> None:
    """A/B/A/B without a pause: all are served, and one swap serves many."""
    size = CAPACITY_BYTES * 3 // 5
    models = [SimulatedModel(each, size, size, load_s, 1.0, 64) for each in names]
    world = World(models)
    requests = 1200
    until_s = requests / 4
    arrivals = [
        Arrival(at=number / 4, model=names[number % len(names)], run_s=2.0)
        for number in range(requests)
    ]
    add_arrivals(world, arrivals)
    served_early: Counter[str] = Counter()

    def on_grant(visit: Visit) -> None:
        if world.clock.now <= until_s:
            served_early[visit.arrival.model] += 1

    world.on_grant = on_grant
    world.run_and_empty()
    assert all(visit.outcome == "granted" for visit in world.visits)
    waits_s = [(visit.granted_at or 0.0) - visit.arrival.at for visit in world.visits]
    turn_s = OVERTAKE_S + 2.0 + 1.0 + load_s
    assert max(waits_s) <= OVERTAKE_S + len(names) * turn_s
    assert world.loads <= 2 * until_s / turn_s + 2
    for name in names:
        fair_share = requests / len(names)
        assert served_early[name] >= 0.5 * fair_share, "starved while the load went on"


def test_a_rare_model_is_served_within_a_stream_for_another() -> None:
    models = [SimulatedModel(each, 60, 60, 3.0, 1.0, 4) for each in "ab"]
    world = World(models)
    stream = [Arrival(at=number / 2, model="a", run_s=1.5) for number in range(400)]
    add_arrivals(world, [*stream, Arrival(at=50.1, model="b", run_s=1.0)])
    world.run_and_empty()
    rare = next(visit for visit in world.visits if visit.arrival.model == "b")
    assert rare.granted_at is not None
    assert rare.granted_at - rare.arrival.at <= OVERTAKE_S + 1.5 + 1.0 + 3.0 + 0.1
    assert world.loads == 3


def test_a_batch_request_is_not_starved_by_interactive_ones() -> None:
    world = World([SimulatedModel("a", 60, 60, 1.0, 1.0, 1)])
    stream = [
        Arrival(at=number / 2, model="a", run_s=1.0, priority=Priority.INTERACTIVE)
        for number in range(100)
    ]
    add_arrivals(world, [*stream, Arrival(at=5.0, model="a", run_s=1, priority=Priority.BATCH)])
    world.run_and_empty()
    batch = next(visit for visit in world.visits if visit.arrival.priority is Priority.BATCH)
    assert batch.granted_at is not None
    # In front of it, once overdue: only those that came before it, served one a second.
    assert batch.granted_at - batch.arrival.at <= OVERTAKE_S + 1.0


def test_a_request_that_needs_room_is_not_starved_by_those_of_its_model_that_need_none() -> None:
    """Found by the search: its model's only place was given away while the room was being made."""
    world = World([SimulatedModel("a", 69, 69, 1.0, 1.0, 1), SimulatedModel("b", 22, 22, 0, 0, 1)])
    stream = [Arrival(at=number, model="b", run_s=1.0) for number in range(100)]
    large = Arrival(at=5.0, model="b", run_s=1.0, working_bytes=10)
    add_arrivals(world, [Arrival(at=0.0, model="a", run_s=1.0), *stream, large])
    world.run_and_empty()
    visit = next(visit for visit in world.visits if visit.arrival is large)
    assert visit.granted_at is not None
    # Once overdue: those that came before it, one a second, and the unloading of the other model.
    assert visit.granted_at - large.at <= OVERTAKE_S + 3.0 + 1.0


def test_room_that_others_take_for_a_while_only_delays() -> None:
    world = World([SimulatedModel(each, 60, 60, 1.0, 1.0, 4) for each in "ab"])
    world.set_external(50)
    add_arrivals(world, [Arrival(at=1.0, model="a", run_s=1.0)])
    world.after(30.0, lambda: world.set_external(0))
    world.run_and_empty()
    assert world.visits[0].granted_at == pytest.approx(32.1, abs=1.0)
    assert world.loads == 1


def test_a_model_state_is_told_truly_at_every_step() -> None:
    models = [SimulatedModel(each, 60, 60, 1.0, 1.0, 4, parkable=1.0) for each in "ab"]
    world = World(models)

    def after_step() -> None:
        for model in world.scheduler.report.models():
            there = model.id in world.loaded_at
            absent = model.state in (ModelState.ABSENT, ModelState.LOADING)
            assert absent != there
            off = {block.name for block in model.blocks if block.tier == "host"}
            if model.state is not ModelState.WAKING:
                assert off == world.parked[model.id]
            assert model.leases == world.running[model.id]

    world.after_step = after_step
    add_arrivals(
        world, [Arrival(at=number * 3.0, model="ab"[number % 2], run_s=2.0) for number in range(20)]
    )
    world.run_and_empty()
    assert world.loads == 2
    assert world.wakes >= 10


# Sessions.


def test_a_session_keeps_its_models_and_the_others_share_the_rest() -> None:
    """Requests for models that fit beside the session's go on, those for others wait for its end.

    A request that must wait for the end holds up nobody that can be served.
    """
    world = World([SimulatedModel(each, 30, 30, 1.0, 1.0, 4) for each in "abcd"])
    world.models["d"] = SimulatedModel("d", 60, 60, 1.0, 1.0, 4)
    session = Arrival(at=0.0, model="a", run_s=100.0, keeps=("b",))
    waits = Arrival(at=10.0, model="d", run_s=1.0)
    small = [Arrival(at=20.0 + number, model="c", run_s=1.0) for number in range(30)]
    own = [Arrival(at=20.0 + number, model="ab"[number % 2], run_s=1.0) for number in range(30)]
    add_arrivals(world, [session, waits, *small, *own])
    world.run_and_empty()
    ended_at = next(v.granted_at or 0.0 for v in world.visits if v.arrival is session) + 100.0
    for visit in world.visits:
        assert visit.granted_at is not None
        if visit.arrival is waits:
            assert ended_at <= visit.granted_at <= ended_at + 5.0
        else:
            assert visit.granted_at - visit.arrival.at <= 3.2, visit
    assert world.loads == 4


def test_a_session_is_not_starved_by_requests_for_other_models() -> None:
    world = World([SimulatedModel(each, 40, 40, 1.0, 1.0, 4) for each in "abcd"])
    stream = [Arrival(at=number / 4, model="cd"[number % 2], run_s=1.5) for number in range(240)]
    add_arrivals(world, [*stream, Arrival(at=20.1, model="a", run_s=5.0, keeps=("b",))])
    world.run_and_empty()
    session = next(visit for visit in world.visits if visit.arrival.keeps is not None)
    assert session.granted_at is not None
    assert session.granted_at - session.arrival.at <= OVERTAKE_S + 1.5 + 2 * (1.0 + 1.0) + 0.2


def test_a_session_that_others_leave_no_room_for_is_refused_at_once() -> None:
    world = World([SimulatedModel(each, 40, 40, 1.0, 1.0, 4) for each in "abcd"])
    first = Arrival(at=0.0, model="a", run_s=50.0, keeps=("b",))
    shares = Arrival(at=10.0, model="b", run_s=5.0, keeps=())
    late = Arrival(at=20.0, model="c", run_s=5.0, keeps=("b",))
    never = Arrival(at=21.0, model="a", run_s=5.0, keeps=("b", "c"))
    later = Arrival(at=60.0, model="c", run_s=5.0, keeps=("d",))
    add_arrivals(world, [first, shares, late, never, later])
    world.run_and_empty()
    outcomes = [visit.outcome for visit in world.visits]
    assert outcomes == ["granted", "granted", "overloaded", "insufficient_capacity", "granted"]
    assert world.loads == 4
    assert world.unloads == 4
