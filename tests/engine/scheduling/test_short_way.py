"""The short way of a warm request decides as a whole plan would, whatever comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.errors import EngineError
from engine.memory.block import Block
from engine.process.faults import FAULTS
from engine.scheduling.ledger import Ledger
from engine.scheduling.order import Order, OrderKind
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_event import SchedulerEvent
from tests.engine.scheduling.world import Client, Clock, RecordedEffects, client, config, estimate

SIZES = {"a": 30, "b": 40, "c": 50}
PLACES = {"a": 1, "b": 2, "c": 4}
KEEP_ALIVE_S = {"a": 3.0, "b": 0.0, "c": 7.0}


class Long(Scheduler):
    """Plans for everything."""

    def _can_grant_at_once(self, *_: Any) -> bool:
        return False

    def _may_stay(self, *_: Any) -> bool:
        return False


@dataclass
class World:
    """A scheduler whose effects end as soon as the event that asked for them has been handled."""

    kind: type[Scheduler]
    clock: Clock = field(default_factory=Clock)
    effects: RecordedEffects = field(default_factory=RecordedEffects)
    events: list[SchedulerEvent] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        models = [
            ModelConfig.model_construct(id=name, source="folder", keep_alive=KEEP_ALIVE_S[name])
            for name in SIZES
        ]
        self.ledger = Ledger(budget_bytes=100, total_bytes=100)
        self.scheduler = self.kind(
            config(models, max_overtake_s=4.0),
            self.ledger,
            self.effects,
            self.clock,
            on_event=self.events.append,
        )

    def do(self, step: tuple[Any, ...]) -> None:
        what, *rest = step
        getattr(self, f"_{what}")(*rest)
        self._end_effects()

    def _ask(self, model: str, options: dict[str, Any]) -> None:
        made = client(model, request_id=str(len(self.clients)), **options)
        self.clients.append(made)
        try:
            self.scheduler.on_request(made.ticket)
        except EngineError as error:
            made.error = error

    def _leave(self, number: int) -> None:
        if self.clients:
            one = self.clients[number % len(self.clients)]
            if one.lease is not None:
                one.lease.release()
            elif one.error is None:
                self.scheduler.on_cancel(one.ticket)
                one.error = EngineError("gone")

    def _order(self, kind: OrderKind, model: str) -> None:
        order = Order(
            kind=kind,
            model_id=model,
            timeout_s=5.0,
            on_done=lambda: self.answers.append("done"),
            on_refused=lambda error: self.answers.append(type(error).__name__),
        )
        try:
            self.scheduler.on_order(order)
        except EngineError as error:
            self.answers.append(type(error).__name__)

    def _pin(self, model: str, pinned: bool) -> None:
        (self.scheduler.pin if pinned else self.scheduler.unpin)(model)

    def _fail(self, model: str) -> None:
        self.scheduler.on_model_failed(model, "broken")

    def _others(self, nbytes: int) -> None:
        self.effects.external_bytes = nbytes
        self.scheduler.on_timer()

    def _pass(self, seconds: int) -> None:
        """Time passes; the alarm rings when it was asked to, and no sooner."""
        end = self.clock.now + seconds
        while (at := self.effects.wake_at) is not None and at <= end:
            self.clock.now = max(self.clock.now, at)
            self.effects.wake_at = None
            self.scheduler.on_timer()
            self._end_effects()
        self.clock.now = end

    def _end_effects(self) -> None:
        while self.done < len(self.effects.calls):
            what, name = self.effects.calls[self.done]
            self.done += 1
            if what == "estimate":
                self.scheduler.on_estimate(name, estimate(SIZES[name]))
            elif what == "load":
                blocks = (Block("weights", SIZES[name], parkable=True),)
                self.scheduler.on_loaded(name, blocks, 1.0, PLACES[name], SIZES[name])
            elif what == "unload":
                self.scheduler.on_unloaded(name)
            elif what == "park":
                self.scheduler.on_parked(name.partition(":")[0])
            elif what == "wake":
                self.scheduler.on_woken(name.partition(":")[0], 0.1)

    def seen(self) -> tuple[Any, ...]:
        """All that clients, administrators and runtimes can tell."""
        outcomes = [
            (one.lease is not None, type(one.error).__name__, one.lease and one.lease.timings)
            for one in self.clients
        ]
        models = [(each.id, each.state, each.leases) for each in self.scheduler.report.models()]
        told = [(event.kind, event.model, event.reason) for event in self.events]
        return outcomes, self.answers, models, told, self.effects.calls, self.ledger.granted_bytes


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "working_bytes": st.sampled_from([5, 20, 60]),
        "timeout_s": st.sampled_from([0.0, 3.0]),
        "exclusive": st.just(True),
        "no_evict": st.just(True),
        "if_loaded_only": st.just(True),
        "keep_alive_s": st.sampled_from([0.0, 2.0]),
    },
)
NAMES = st.sampled_from(sorted(SIZES))
STEPS = st.one_of(
    st.tuples(st.just("ask"), NAMES, OPTIONS),
    st.tuples(st.just("ask"), NAMES, st.just({})),
    st.tuples(st.just("leave"), st.integers(0, 50)),
    st.tuples(st.just("leave"), st.integers(0, 50)),
    st.tuples(st.just("pass"), st.integers(0, 5)),
    st.tuples(st.just("order"), st.sampled_from(OrderKind), NAMES),
    st.tuples(st.just("pin"), NAMES, st.booleans()),
    st.tuples(st.just("fail"), NAMES),
    st.tuples(st.just("others"), st.sampled_from([0, 10, 50])),
)


@given(st.lists(STEPS, max_size=40))
def test_it_does_what_a_whole_plan_would(steps: list[tuple[Any, ...]]) -> None:
    short, long = World(Scheduler), World(Long)
    for step in steps:
        short.do(step)
        long.do(step)
        assert short.seen() == long.seen(), step


def test_a_warm_request_asks_for_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Scheduler)
    world.do(("ask", "c", {}))
    monkeypatch.setattr(world.scheduler, "_replan", pytest.fail)
    for _ in range(3):
        world.do(("ask", "c", {}))
    for number in range(4):
        world.do(("leave", number))
    assert [one.lease is not None for one in world.clients] == [True] * 4


def test_an_error_of_whoever_is_granted_is_a_fault() -> None:
    world = World(Scheduler)
    world.do(("ask", "c", {}))

    def broken(_: Any) -> None:
        raise RuntimeError("a bug")

    made = client("c")
    object.__setattr__(made.ticket, "on_granted", broken)
    with pytest.raises(RuntimeError):
        world.scheduler.on_request(made.ticket)
    assert FAULTS.first is not None and "a bug" in str(FAULTS.first)
    FAULTS.clear()
