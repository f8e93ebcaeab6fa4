"""The scheduler, event by event: no sleeps, a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.errors import (
    Conflict,
    EngineError,
    InsufficientCapacity,
    LoadFailed,
    Overloaded,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from engine.memory.block import Block
from engine.requests import Priority
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Ledger
from engine.scheduling.order import Order, OrderKind
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.scheduling.ticket import Ticket
from engine.status import ModelState, ModelStatus
from tests.engine.scheduling.world import (
    Client,
    Clock,
    RecordedEffects,
    ask,
    client,
    config,
    estimate,
)


@dataclass
class Answer:
    """What became of an order."""

    order: Order = field(init=False)
    done: bool = False
    error: EngineError | None = None

    def on_done(self) -> None:
        assert self.waits, "answered twice"
        self.done = True

    def on_refused(self, error: EngineError) -> None:
        assert self.waits, "answered twice"
        self.error = error

    @property
    def waits(self) -> bool:
        return not self.done and self.error is None


@dataclass
class Bench:
    """A scheduler over 100 bytes with models a, b and c, and everything around it."""

    scheduler: Scheduler
    effects: RecordedEffects
    ledger: Ledger
    clock: Clock
    events: list[SchedulerEvent] = field(default_factory=list)
    empties: list[None] = field(default_factory=list)

    @property
    def emptied(self) -> bool:
        return bool(self.empties)

    def ask(self, model_id: str, **options: Any) -> Client:
        return ask(self.scheduler, model_id, **options)

    def loaded(self, model_id: str, nbytes: int, *, seconds: float = 2.0, leases: int = 4) -> None:
        self.scheduler.on_loaded(model_id, (Block("weights", nbytes),), seconds, leases)

    def bring_in(self, model_id: str, nbytes: int, *, leases: int = 4) -> Client:
        """Load a model for one request, which is left running."""
        first = self.ask(model_id)
        self.scheduler.on_estimate(model_id, estimate(nbytes))
        self.loaded(model_id, nbytes, leases=leases)
        return first

    def model(self, model_id: str) -> ModelStatus:
        return next(each for each in self.scheduler.report.models() if each.id == model_id)

    def unload(self, model_id: str) -> Answer:
        return self.order(OrderKind.UNLOAD, model_id)

    def park(self, model_id: str) -> Answer:
        return self.order(OrderKind.PARK, model_id)

    def order(self, kind: OrderKind, model_id: str, timeout_s: float = 1000.0) -> Answer:
        answer = Answer()
        answer.order = Order(
            kind=kind,
            model_id=model_id,
            timeout_s=timeout_s,
            on_done=answer.on_done,
            on_refused=answer.on_refused,
        )
        self.scheduler.on_order(answer.order)
        return answer

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Make:
    def build(*models: str | ModelConfig, **limits: Any) -> Bench:
        clock, effects = Clock(), RecordedEffects()
        ledger = Ledger(budget_bytes=100, total_bytes=100)
        events: list[SchedulerEvent] = []
        empties: list[None] = []
        scheduler = Scheduler(
            config(models or ("a", "b", "c"), **limits),
            ledger,
            effects,
            clock,
            on_event=events.append,
            on_empty=lambda: empties.append(None),
            created=7,
        )
        return Bench(scheduler, effects, ledger, clock, events, empties)

    return build


@pytest.fixture
def bench(make: Make) -> Bench:
    return make()


# From ticket to lease.


def test_a_first_request_is_estimated_reserved_loaded_and_granted(bench: Bench) -> None:
    first = bench.ask("a", request_id="r1", working_bytes=5)
    second = bench.ask("a", request_id="r2")
    assert bench.effects.calls == [("estimate", "a")], "asked once for both"
    bench.scheduler.on_estimate("a", estimate(50))
    assert bench.effects.calls[1:] == [("load", "a")]
    assert bench.scheduler.transition == "loading a"
    assert [(e.kind, e.nbytes) for e in bench.ledger.status().entries] == [("reservation", 50)]
    assert first.waits and second.waits
    bench.clock.now += 3
    bench.loaded("a", 45)
    assert first.lease is not None and second.lease is not None
    assert first.lease.timings.queued_s == 3
    assert first.lease.timings.load_s == 3
    assert [(e.kind, e.name, e.nbytes) for e in bench.ledger.status().entries] == [
        ("block", "weights", 45),
        ("lease", "r1#0", 5),
    ]
    assert bench.kinds() == [
        EventKind.LOAD, EventKind.LOADED, EventKind.GRANT, EventKind.GRANT,
    ]  # fmt: skip
    assert bench.events[-2].granted_bytes == 50
    first.release()
    second.release()
    assert bench.ledger.granted_bytes == 45


def test_a_warm_request_is_granted_before_on_request_returns(bench: Bench) -> None:
    bench.bring_in("a", 50)
    bench.clock.now += 1
    warm = bench.ask("a")
    assert bench.scheduler.transition is None
    assert warm.lease is not None
    assert warm.lease.timings.queued_s == 0
    assert warm.lease.timings.load_s == 0


def test_a_lease_tells_how_much_of_the_wait_was_the_load(bench: Bench) -> None:
    before = bench.ask("a")
    bench.clock.now += 5
    bench.scheduler.on_estimate("a", estimate(50))
    bench.clock.now += 1
    during = bench.ask("a")
    bench.clock.now += 2
    bench.loaded("a", 50)
    assert before.lease is not None and during.lease is not None
    assert (before.lease.timings.queued_s, before.lease.timings.load_s) == (8, 3)
    assert (during.lease.timings.queued_s, during.lease.timings.load_s) == (2, 2)


def test_a_lease_is_given_back_once(bench: Bench) -> None:
    first = bench.bring_in("a", 50)
    second = bench.ask("a")
    assert first.lease is not None
    with first.lease:
        assert bench.model("a").leases == 2
        assert bench.model("a").idle_s is None
    first.release()
    assert bench.model("a").leases == 1
    assert bench.model("a").idle_s is None
    second.release()
    bench.clock.now += 4
    assert bench.model("a").leases == 0
    assert bench.model("a").idle_s == 4, "idle since the last release"


def test_an_idle_model_makes_room_and_memory_is_measured_after(bench: Bench) -> None:
    bench.bring_in("a", 60).release()
    other = bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    assert bench.effects.calls[-1] == ("unload", "a")
    assert bench.ledger.granted_bytes == 60, "what is being unloaded is still there"
    bench.effects.external_bytes = 50  # the unload gave back less than was granted
    bench.scheduler.on_unloaded("a")
    assert bench.ledger.capacity_bytes == 50
    assert bench.effects.calls[-1] == ("unload", "a"), "loaded on trust"
    assert bench.effects.wake_at == bench.clock.now + 1
    bench.effects.external_bytes = 0
    bench.clock.now += 1
    bench.scheduler.on_timer()
    assert bench.effects.calls[-1] == ("load", "b")
    bench.loaded("b", 60)
    assert other.lease is not None


def test_memory_is_measured_before_a_load_is_begun(bench: Bench) -> None:
    waiting = bench.ask("a")
    bench.effects.external_bytes = 60
    bench.scheduler.on_estimate("a", estimate(50))
    assert waiting.waits
    assert ("load", "a") not in bench.effects.calls


def test_a_leased_model_stays_until_its_last_lease_ends(bench: Bench) -> None:
    running = bench.bring_in("a", 60)
    claim = bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    bench.clock.now += 10
    bench.scheduler.on_timer()
    younger = bench.ask("a")
    assert younger.waits, "the overdue claim comes first"
    assert ("unload", "a") not in bench.effects.calls
    running.release()
    assert bench.effects.calls[-1] == ("unload", "a")
    bench.scheduler.on_unloaded("a")
    bench.loaded("b", 60)
    assert claim.lease is not None
    assert younger.waits


def test_working_memory_given_back_is_not_waited_for(bench: Bench) -> None:
    bench.bring_in("a", 60)
    bench.ask("a", working_bytes=30).release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    bench.clock.now += 10
    assert bench.ask("a").waits, "a must be drained"


def test_the_model_chosen_to_drain_stays_the_choice(bench: Bench) -> None:
    bench.bring_in("a", 50)
    bench.ask("a").release()
    bench.bring_in("b", 50)
    bench.ask("c")
    bench.scheduler.on_estimate("c", estimate(50))
    bench.clock.now += 10
    bench.scheduler.on_timer()
    held = [bench.ask("b") for _ in range(5)]  # the demand for b now exceeds that for a
    assert all(each.waits for each in held), "drained by turns, neither would ever be idle"
    assert bench.ask("a").lease is not None


def test_the_timer_is_asked_for_the_moment_a_claim_is_overdue(bench: Bench) -> None:
    bench.bring_in("a", 60)
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    overdue_at = bench.clock.now + 10
    assert bench.effects.wake_at == overdue_at
    bench.effects.wake_at = None
    bench.ask("b")
    assert bench.effects.wake_at is None, "asked again for what was asked"
    bench.clock.now += 1
    bench.scheduler.on_timer()
    assert bench.effects.wake_at == overdue_at, "the timer came early and was not asked again"


def test_the_model_less_in_demand_makes_room(bench: Bench) -> None:
    first, second = bench.bring_in("a", 50), bench.bring_in("b", 50)
    for _ in range(5):
        bench.ask("a").release()
    first.release()
    bench.clock.now += 1
    second.release()
    bench.ask("c")
    bench.scheduler.on_estimate("c", estimate(50))
    assert bench.effects.calls[-1] == ("unload", "b"), "though it was used last"


def test_an_idle_model_leaves_after_its_keep_alive(make: Make) -> None:
    bench = make(ModelConfig.model_construct(id="a", source="folder", keep_alive=30.0))
    bench.bring_in("a", 60).release()
    expires_at = bench.clock.now + 30
    assert bench.effects.wake_at == bench.clock.now + 10, "when the request would be overdue"
    bench.clock.now += 10
    bench.scheduler.on_timer()
    assert bench.effects.wake_at == expires_at
    bench.clock.now = expires_at
    bench.scheduler.on_timer()
    assert bench.effects.calls[-1] == ("unload", "a")
    bench.effects.external_bytes = 30
    bench.scheduler.on_timer()
    assert bench.ledger.capacity_bytes == 100, "measured while bytes were moving"
    bench.scheduler.on_unloaded("a")
    assert bench.ledger.capacity_bytes == 70, "not measured after an eviction"
    assert bench.scheduler.empty
    assert bench.ledger.status().entries == ()


# Admission.


def test_queues_are_bounded_and_say_when_to_come_back(make: Make) -> None:
    bench = make("a", "b", max_queue=3, max_queue_per_model=2)
    served = bench.bring_in("a", 50, leases=1)
    bench.clock.now += 20
    served.release()
    bench.ask("a")  # runs
    bench.ask("a")  # waits
    third = bench.ask("a")
    with pytest.raises(Overloaded) as overloaded:
        bench.ask("b")
    assert overloaded.value.code == "overloaded"
    bench.scheduler.on_cancel(third.ticket)
    bench.scheduler.on_cancel(client("a").ticket)
    bench = make("a", max_queue_per_model=2)
    served = bench.bring_in("a", 50, leases=1)
    bench.clock.now += 20
    served.release()
    for _ in range(3):
        bench.ask("a")
    with pytest.raises(QueueFull) as full:
        bench.ask("a")
    assert full.value.retry_after_s == pytest.approx(60), "3 before it, 20 s each"


def test_coming_back_counts_the_load_of_an_absent_model(make: Make) -> None:
    bench = make("a", max_queue_per_model=1)
    bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50, load_seconds=30.0))
    with pytest.raises(QueueFull) as full:
        bench.ask("a")
    assert full.value.retry_after_s == 31


def test_a_ticket_that_waited_its_time_is_refused(bench: Bench) -> None:
    bench.bring_in("a", 50, leases=1)
    late = bench.ask("a", timeout_s=5)
    patient = bench.ask("a")
    assert bench.effects.wake_at == bench.clock.now + 5
    bench.clock.now += 5
    bench.scheduler.on_timer()
    assert isinstance(late.error, QueueTimeout)
    assert late.error.retry_after_s >= 1
    assert patient.waits
    assert [each.waited_s for each in bench.scheduler.report.queue()] == [5]


def test_what_can_never_fit_is_refused(bench: Bench) -> None:
    too_big = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(101))
    assert isinstance(too_big.error, InsufficientCapacity)
    assert ("load", "a") not in bench.effects.calls


def test_a_ticket_cannot_be_queued_twice(bench: Bench) -> None:
    twice = bench.ask("a")
    with pytest.raises(ValueError, match="cannot be queued"):
        bench.scheduler.on_request(twice.ticket)
    with pytest.raises(ValueError, match="cannot be queued"):
        bench.ask("a", working_bytes=-1)
    assert bench.model("a").waiting == 1


# Cancelling.


def test_cancelling_lets_a_load_finish_and_leaks_nothing(bench: Bench) -> None:
    only = bench.ask("a", working_bytes=5)
    bench.scheduler.on_estimate("a", estimate(50))
    bench.scheduler.on_cancel(only.ticket)
    bench.scheduler.on_cancel(only.ticket)
    assert bench.scheduler.report.queue() == ()
    bench.loaded("a", 50)
    assert only.waits, "a cancelled ticket was answered"
    assert bench.model("a").state is ModelState.RESIDENT
    assert bench.ledger.granted_bytes == 50
    bench.clock.now += 300
    bench.scheduler.on_timer()
    bench.scheduler.on_unloaded("a")
    assert bench.scheduler.empty and bench.ledger.granted_bytes == 0


def test_cancelling_a_granted_ticket_leaves_its_lease(bench: Bench) -> None:
    running = bench.bring_in("a", 50)
    bench.scheduler.on_cancel(running.ticket)
    assert bench.model("a").leases == 1


def test_a_cancelled_claim_frees_those_it_held_back(bench: Bench) -> None:
    bench.bring_in("a", 60)
    claim = bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    bench.clock.now += 10
    held = bench.ask("a")
    assert held.waits
    bench.scheduler.on_cancel(claim.ticket)
    assert held.lease is not None


# Sessions.


def test_a_session_keeps_its_models_until_it_ends(bench: Bench) -> None:
    session = bench.ask("a", keeps=("b",))
    assert [bench.model(each).waiting for each in "ab"] == [1, 1]
    for each in "ab":
        bench.scheduler.on_estimate(each, estimate(50))
    for each in "ab":
        bench.scheduler.on_loaded(each, [Block("weights", 50)], 1.0, 1)
    assert session.lease is not None
    assert [(bench.model(each).holds, bench.model(each).leases) for each in "ab"] == [(1, 0)] * 2
    assert bench.model("a").idle_s is None
    with pytest.raises(Conflict, match="kept by 1 sessions"):
        bench.order(OrderKind.UNLOAD, "b")
    run = bench.ask("a")  # of the session, or of others
    assert run.lease is not None
    run.release()
    bench.clock.now += 1000.0
    bench.scheduler.on_timer()
    assert bench.model("a").state is ModelState.RESIDENT
    session.release()
    session.release()
    assert [bench.model(each).holds for each in "ab"] == [0, 0]
    bench.clock.now += 1000.0
    bench.scheduler.on_timer()
    assert bench.effects.calls[-1][0] == "unload"


def test_a_session_fails_if_one_of_its_models_does(bench: Bench) -> None:
    session = bench.ask("a", keeps=("b",))
    bench.scheduler.on_estimate("a", estimate(40))
    bench.scheduler.on_estimate_failed("b", "no such file")
    assert isinstance(session.error, LoadFailed)
    assert [bench.model(each).waiting for each in "ab"] == [0, 0]
    with pytest.raises(LoadFailed, match="no such file"):
        bench.ask("a", keeps=("b",))


# Failures.


def test_a_failed_load_fails_only_those_who_wait_for_it(bench: Bench) -> None:
    waiting = [bench.ask("a"), bench.ask("a")]
    other = bench.ask("b")
    bench.scheduler.on_estimate("a", estimate(50))
    bench.scheduler.on_estimate("b", estimate(50))
    bench.scheduler.on_load_failed("a", LoadFailed("no such file"))
    errors = [each.error for each in waiting]
    assert all(isinstance(error, LoadFailed) for error in errors)
    assert errors[0] is not errors[1], "one exception in two tasks"
    assert str(errors[0]) == "no such file"
    assert other.waits
    assert bench.effects.calls[-1] == ("load", "b")
    assert bench.model("a").last_error == "no such file"
    assert bench.model("a").state is ModelState.ABSENT
    assert {entry.owner for entry in bench.ledger.status().entries} == {"b"}


def test_a_failed_load_backs_off_doubling_and_forgets_the_estimate(bench: Bench) -> None:
    for backoff_s in (1, 2, 4, 8, 16, 32, 60, 60):
        tried = bench.ask("a")
        assert bench.effects.calls[-1] == ("estimate", "a"), "the files may have been mended"
        bench.scheduler.on_estimate("a", estimate(50))
        bench.scheduler.on_load_failed("a", LoadFailed("broken"))
        assert isinstance(tried.error, LoadFailed)
        bench.clock.now += backoff_s - 0.5
        with pytest.raises(LoadFailed, match=r"^broken \(tried again after 1 s\)$"):
            bench.ask("a")
        bench.clock.now += 0.5
    forced = bench.ask("a")
    bench.scheduler.on_estimate_failed("a", "gone")
    assert isinstance(forced.error, LoadFailed)
    with pytest.raises(LoadFailed, match="gone"):
        bench.ask("a")
    by_hand = client("a")
    bench.scheduler.on_request(by_hand.ticket, ignore_backoff=True)
    bench.scheduler.on_estimate("a", estimate(50))
    bench.loaded("a", 50)
    assert by_hand.lease is not None
    assert bench.model("a").last_error is None
    assert bench.ask("a").lease is not None, "still backing off after a good load"


def test_a_good_load_ends_the_doubling(bench: Bench) -> None:
    for outcome in ("fails", "loads", "fails"):
        asked = bench.ask("a")
        if bench.effects.calls[-1] == ("estimate", "a"):
            bench.scheduler.on_estimate("a", estimate(50))
        if outcome == "fails":
            bench.scheduler.on_load_failed("a", LoadFailed("broken"))
            bench.clock.now += 1
        else:
            bench.loaded("a", 50)
            asked.release()
            bench.unload("a")
            bench.scheduler.on_unloaded("a")
    assert bench.ask("a").waits, "2 s of backoff for a first failure"


def test_what_was_measured_outlives_a_later_estimate(bench: Bench) -> None:
    running = bench.bring_in("a", 50)
    bench.scheduler.on_estimate("a", estimate(99))
    assert bench.model("a").estimated_bytes == 50
    waiting = bench.ask("a", working_bytes=40)
    running.release()
    stuck = bench.ask("a", working_bytes=20)
    bench.scheduler.on_estimate_failed("a", "gone for a moment")
    assert waiting.lease is not None and stuck.waits
    assert bench.model("a").estimated_bytes == 50


def test_a_load_that_took_more_leaves_and_reserves_what_it_took(bench: Bench) -> None:
    bench.bring_in("b", 40).release()
    waiting = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50))
    bench.loaded("a", 61)
    assert bench.model("a").state is ModelState.UNLOADING
    assert bench.model("a").estimated_bytes == 61
    assert waiting.waits
    bench.scheduler.on_unloaded("a")
    assert bench.effects.calls[-1] == ("unload", "b")
    bench.scheduler.on_unloaded("b")
    assert bench.effects.calls[-1] == ("load", "a")
    bench.loaded("a", 61)
    assert waiting.lease is not None
    assert bench.ledger.granted_bytes == 61


def test_a_load_that_takes_more_than_there_is_ends_in_a_refusal(bench: Bench) -> None:
    waiting = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50))
    bench.loaded("a", 101)
    assert isinstance(waiting.error, InsufficientCapacity)
    bench.scheduler.on_unloaded("a")
    assert bench.scheduler.empty and bench.ledger.granted_bytes == 0


def test_a_load_that_takes_ever_more_counts_as_failed(bench: Bench) -> None:
    running = bench.bring_in("b", 20)
    waiting = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50))
    bench.effects.external_bytes = 0
    bench.loaded("a", 81)
    bench.scheduler.on_unloaded("a")
    running.release()
    bench.scheduler.on_unloaded("b")
    bench.loaded("a", 101)
    assert isinstance(waiting.error, LoadFailed)
    assert bench.model("a").state is ModelState.UNLOADING
    bench.scheduler.on_unloaded("a")
    assert bench.scheduler.empty and bench.ledger.granted_bytes == 0


def test_only_overflows_in_a_row_count_as_failed(bench: Bench) -> None:
    """Beside b, 70 bytes are there for a while b uses its working memory, then 80."""
    bench.bring_in("b", 20)

    def overflow(estimated_bytes: int | None) -> Client:
        using = bench.ask("b", working_bytes=10)
        waiting = bench.ask("a")
        if estimated_bytes is not None:
            bench.scheduler.on_estimate("a", estimate(estimated_bytes))
        bench.loaded("a", 71)
        assert waiting.waits
        bench.scheduler.on_unloaded("a")
        using.release()
        assert bench.scheduler.transition == "loading a"
        return waiting

    waiting = overflow(50)
    bench.loaded("a", 60)
    waiting.release()
    bench.unload("a")
    bench.scheduler.on_unloaded("a")
    waiting = overflow(None)
    bench.loaded("a", 81)
    assert isinstance(waiting.error, LoadFailed)
    bench.scheduler.on_unloaded("a")
    bench.clock.now += 1
    overflow(50)


def test_a_model_that_dies_before_it_serves_again_is_a_failed_load(bench: Bench) -> None:
    bench.bring_in("a", 50).release()
    bench.unload("a")
    bench.scheduler.on_unloaded("a")
    waiting = bench.ask("a")
    bench.scheduler.on_model_failed("a", "died young")
    bench.loaded("a", 50)
    assert isinstance(waiting.error, LoadFailed)


def test_a_model_that_died_serves_nobody_new_and_is_loaded_afresh(bench: Bench) -> None:
    running = bench.bring_in("a", 50)
    bench.scheduler.on_model_failed("a", "cuda error")
    waiting = bench.ask("a")
    assert waiting.waits
    assert ("unload", "a") not in bench.effects.calls, "it still has a lease"
    assert bench.model("a").last_error == "cuda error"
    running.release()
    assert bench.effects.calls[-1] == ("unload", "a")
    bench.scheduler.on_unloaded("a")
    assert bench.effects.calls[-1] == ("load", "a")
    bench.loaded("a", 50)
    assert waiting.lease is not None


@pytest.mark.parametrize("before_loaded", [True, False])
def test_a_model_that_dies_before_it_served_anyone_is_a_failed_load(
    bench: Bench, before_loaded: bool
) -> None:
    waiting = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50))
    if before_loaded:
        bench.scheduler.on_model_failed("a", "died young")
        bench.loaded("a", 50)
        assert isinstance(waiting.error, LoadFailed)
    else:
        bench.scheduler.on_cancel(waiting.ticket)
        bench.loaded("a", 50)
        bench.scheduler.on_model_failed("a", "died young")
    assert bench.effects.calls[-1] == ("unload", "a")
    with pytest.raises(LoadFailed, match="died young"):
        bench.ask("a")


# Commands.


def test_unloading_by_hand_is_refused_while_it_would_hurt(bench: Bench) -> None:
    bench.unload("a")  # absent: nothing to do
    running = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(50))
    with pytest.raises(Conflict, match="being loaded"):
        bench.unload("a")
    bench.loaded("a", 50, leases=1)
    with pytest.raises(Conflict, match="in use"):
        bench.unload("a")
    running.release()
    bench.scheduler.pin("a")
    with pytest.raises(Conflict, match="pinned"):
        bench.unload("a")
    bench.scheduler.unpin("a")
    using = bench.bring_in("b", 50)
    stuck = bench.ask("a", working_bytes=10)
    with pytest.raises(Conflict, match="waited for"):
        bench.unload("a")
    bench.scheduler.on_cancel(stuck.ticket)
    using.release()
    bench.unload("a")
    assert bench.effects.calls[-1] == ("unload", "a")
    assert bench.model("a").idle_s is None
    bench.unload("a")  # leaving: nothing to do
    bench.scheduler.on_unloaded("a")
    assert bench.model("a").state is ModelState.ABSENT


def test_unloading_by_hand_waits_for_the_transition_under_way(bench: Bench) -> None:
    bench.bring_in("a", 30).release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(30))
    bench.unload("a")
    assert ("unload", "a") not in bench.effects.calls
    bench.loaded("b", 30)
    assert bench.effects.calls[-1] == ("unload", "a")


def test_a_pinned_model_is_not_evicted(bench: Bench) -> None:
    bench.bring_in("a", 60).release()
    bench.scheduler.pin("a")
    refused = bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    assert isinstance(refused.error, InsufficientCapacity)
    bench.scheduler.unpin("a")
    bench.ask("b")
    assert bench.effects.calls[-1] == ("unload", "a")


# Parking and waking.

PARTS = (
    Block("weights", 50, parkable=True),
    Block("kv_cache", 10, parkable=True, scratch=True),
)


@pytest.fixture
def parked(bench: Bench) -> Bench:
    """Model a parked for a request of b, which runs; a's load took 2 s."""
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    first.release()
    second = bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    assert bench.effects.calls[-1] == ("park", "a:weights")
    bench.scheduler.on_parked("a")
    bench.loaded("b", 60)
    assert second.lease is not None
    second.release()
    return bench


def test_a_model_with_a_host_copy_is_parked_part_by_part(bench: Bench) -> None:
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(45))
    assert "park" not in [call[0] for call in bench.effects.calls]  # it is in use
    first.release()
    assert bench.effects.calls[-1] == ("park", "a:kv_cache")  # of 100 bytes, 5 were lacking
    bench.scheduler.on_parked("a")
    assert bench.model("a").device_bytes == 50
    assert bench.model("a").tier == "host"
    assert bench.effects.calls[-1] == ("load", "b")


def test_a_parked_model_gives_its_bytes_back_and_is_woken(parked: Bench) -> None:
    a = parked.model("a")
    assert (a.state, a.tier, a.device_bytes, a.host_bytes) == (ModelState.PARKED, "host", 10, 50)
    assert [block.tier for block in a.blocks] == ["host", "device"]
    assert parked.ledger.granted_bytes == 70
    waiting = parked.ask("a")
    assert parked.effects.calls[-1] == ("unload", "b")  # without a host copy it cannot be parked
    parked.scheduler.on_unloaded("b")
    assert parked.effects.calls[-1] == ("wake", "a:weights")
    assert parked.ledger.granted_bytes == 60  # reserved before it is brought in
    parked.clock.now += 0.2
    parked.scheduler.on_woken("a", 0.2)
    assert waiting.lease is not None
    assert waiting.lease.timings.tier == "host"
    assert waiting.lease.timings.load_s == pytest.approx(0.2)
    assert parked.model("a").state is ModelState.RESIDENT
    assert {entry.name for entry in parked.ledger.status().entries} == {"weights", "kv_cache"}


def test_a_wake_takes_what_was_measured_for_a_byte(parked: Bench) -> None:
    parked.ask("a")
    parked.scheduler.on_unloaded("b")
    parked.scheduler.on_woken("a", 5.0)
    forecast = parked.scheduler.report.forecast("a")
    assert (forecast.tier, forecast.move_s) == ("device", 0.0)
    parked.ask("b", timeout_s=1.0)
    assert parked.scheduler.report.forecast("b").move_s == 2.0


def test_a_model_that_cannot_be_woken_is_loaded_afresh(parked: Bench) -> None:
    waiting = parked.ask("a")
    parked.scheduler.on_unloaded("b")
    parked.scheduler.on_wake_failed("a", LoadFailed("no room"))
    assert parked.effects.calls[-1] == ("unload", "a")
    parked.scheduler.on_unloaded("a")
    assert parked.effects.calls[-1] == ("load", "a")
    assert parked.ledger.granted_bytes == 60
    parked.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    assert waiting.lease is not None


def test_a_wake_that_fails_gives_its_reservation_back_at_once(parked: Bench) -> None:
    """Not only once the model has left: until then others may take the bytes."""
    parked.ask("a")
    parked.scheduler.on_unloaded("b")
    assert parked.ledger.granted_bytes == 60
    parked.scheduler.on_wake_failed("a", LoadFailed("no room"))
    assert parked.model("a").state is ModelState.UNLOADING
    assert [entry.name for entry in parked.ledger.status().entries] == ["kv_cache"]
    assert parked.ledger.granted_bytes == parked.model("a").device_bytes == 10


def test_what_a_park_freed_is_measured(bench: Bench) -> None:
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    first.release()
    bench.park("a")
    bench.effects.external_bytes = 25  # a library kept some, or others took it
    bench.scheduler.on_parked("a")
    assert bench.ledger.free_bytes == 75


def test_a_parked_model_that_dies_is_unloaded(parked: Bench) -> None:
    parked.scheduler.on_model_failed("a", "its core failed")
    assert parked.effects.calls[-1] == ("unload", "a")


def test_parking_by_hand(bench: Bench) -> None:
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    with pytest.raises(Conflict, match="in use"):
        bench.park("a")
    first.release()
    bench.park("a")
    assert bench.effects.calls[-1] == ("park", "a:kv_cache+weights")
    with pytest.raises(Conflict, match="being parked"):
        bench.unload("a")
    bench.scheduler.on_parked("a")
    bench.park("a")  # it is off already
    bench.bring_in("b", 40).release()
    with pytest.raises(Conflict, match="cannot be parked"):
        bench.park("b")
    bench.unload("a")
    assert bench.effects.calls[-1] == ("unload", "a")


def test_an_order_is_done_once_the_bytes_are_free(bench: Bench) -> None:
    bench.bring_in("a", 50).release()
    ordered = bench.unload("a")
    assert ordered.waits
    bench.scheduler.on_unloaded("a")
    assert ordered.done
    assert bench.unload("a").done  # it is absent
    assert bench.park("a").done


def test_parking_is_done_only_once_all_is_off_the_device(bench: Bench) -> None:
    """A part that leaves for another model is not what was asked for."""
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    first.release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(50))
    assert bench.effects.calls[-1] == ("park", "a:kv_cache")
    ordered = bench.park("a")
    bench.scheduler.on_parked("a")
    assert ordered.waits
    bench.loaded("b", 50)
    assert bench.effects.calls[-1] == ("park", "a:weights")
    bench.scheduler.on_parked("a")
    assert ordered.done


@pytest.mark.parametrize("kind", OrderKind)
def test_an_order_that_waits_is_refused_once_its_model_is_pinned(
    bench: Bench, kind: OrderKind
) -> None:
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    first.release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(10))  # a transition is under way
    ordered = bench.order(kind, "a")
    assert ordered.waits
    bench.scheduler.pin("a")
    assert isinstance(ordered.error, Conflict)
    bench.loaded("b", 10)
    assert bench.model("a").state is ModelState.RESIDENT
    assert bench.ask("a").lease is not None


@pytest.mark.parametrize("kind", OrderKind)
def test_an_order_waits_no_longer_than_its_deadline(bench: Bench, kind: OrderKind) -> None:
    first = bench.ask("a")
    bench.scheduler.on_estimate("a", estimate(60))
    bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
    first.release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(10))
    ordered = bench.order(kind, "a", timeout_s=5.0)
    assert bench.effects.wake_at == bench.clock.now + 5.0
    bench.clock.now += 5.0
    bench.scheduler.on_timer()
    assert isinstance(ordered.error, QueueTimeout)
    assert bench.ask("a").lease is not None  # it stays


def test_an_order_of_which_the_caller_left_is_not_carried_out(bench: Bench) -> None:
    bench.bring_in("a", 30).release()
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(30))
    ordered = bench.unload("a")
    bench.scheduler.on_order_cancelled(ordered.order)
    bench.loaded("b", 30)
    assert bench.model("a").state is ModelState.RESIDENT
    assert ordered.waits


def test_an_order_is_done_also_where_its_model_dies(bench: Bench) -> None:
    bench.bring_in("a", 30).release()
    ordered = bench.unload("a")
    bench.scheduler.on_transition_lost("a", "a bug")
    assert ordered.done


def test_the_end_of_a_drain_is_told_however_the_last_model_left(make: Make) -> None:
    for end in ("load_failed", "wake_failed", "lost"):
        bench = make()
        waiting = bench.ask("a")
        bench.scheduler.on_estimate("a", estimate(30))
        if end == "wake_failed":
            bench.scheduler.on_loaded("a", PARTS, 2.0, 4, host_bytes=50)
            waiting.release()
            bench.park("a")
            bench.scheduler.on_parked("a")
            bench.ask("a")
        bench.scheduler.on_drain()
        assert not bench.emptied
        if end == "load_failed":
            bench.scheduler.on_load_failed("a", LoadFailed("torn"))
        elif end == "lost":
            bench.scheduler.on_transition_lost("a", "a bug")
        else:
            bench.scheduler.on_wake_failed("a", LoadFailed("torn"))
            assert not bench.emptied
            bench.scheduler.on_unloaded("a")
        assert bench.emptied


def test_the_files_of_the_next_model_are_read_ahead_once(bench: Bench) -> None:
    running = bench.bring_in("a", 60)
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60))
    bench.ask("b")
    assert bench.effects.calls.count(("prefetch", "b")) == 1
    running.release()
    bench.scheduler.on_unloaded("a")
    assert bench.effects.calls[-2:] == [("unload", "a"), ("load", "b")]


def test_a_request_sets_the_keep_alive_of_its_model(bench: Bench) -> None:
    bench.bring_in("a", 40).release()
    bench.ask("a", keep_alive_s=0.0).release()
    assert bench.effects.calls[-1] == ("unload", "a")


def test_a_request_for_a_loaded_model_only_is_refused_at_once(bench: Bench) -> None:
    asker = bench.ask("a", if_loaded_only=True)
    assert isinstance(asker.error, Conflict)
    assert asker.error.param == "model"


def test_positions_and_the_time_to_come(bench: Bench) -> None:
    running = bench.bring_in("a", 60, leases=1)
    bench.clock.now += 4.0
    running.release()  # a turn of a takes 4 s
    bench.ask("a")
    second, third, other = bench.ask("a"), bench.ask("a"), bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(60, load_seconds=7.0))
    etas = [status.eta_s for status in bench.scheduler.report.queue()]
    assert etas == [4.0, 8.0, 7.0]
    status = bench.scheduler.report.ticket_status(third.ticket)
    assert status is not None
    assert (status.position, status.eta_s) == (2, 8.0)
    forecast = bench.scheduler.report.forecast("b")
    assert (forecast.fits, forecast.tier, forecast.wanted_bytes) == (True, "disk", 60)
    assert [eviction.model for eviction in forecast.evictions] == ["a"]
    assert bench.scheduler.report.ticket_status(running.ticket) is None
    bench.scheduler.on_cancel(second.ticket)
    bench.clock.now += 1.0
    status = bench.scheduler.report.ticket_status(third.ticket)
    assert status is not None
    assert status.position == 1
    assert other.waits


def test_draining_unloads_what_is_parked(parked: Bench) -> None:
    parked.scheduler.on_drain()
    assert not parked.scheduler.empty
    unloaded = [call for call in parked.effects.calls if call[0] == "unload"]
    parked.scheduler.on_unloaded(unloaded[-1][1])
    parked.scheduler.on_unloaded("b" if unloaded[-1][1] == "a" else "a")
    assert parked.scheduler.empty
    assert parked.ledger.granted_bytes == 0


def test_draining_refuses_the_queue_and_empties_the_device(bench: Bench) -> None:
    running = bench.bring_in("a", 40, leases=1)
    bench.scheduler.pin("a")
    waiting = bench.ask("a")
    bench.ask("b")
    bench.scheduler.on_estimate("b", estimate(40))
    bench.scheduler.on_drain()
    assert isinstance(waiting.error, ShuttingDown)
    with pytest.raises(ShuttingDown):
        bench.ask("a")
    bench.loaded("b", 40)
    assert bench.effects.calls[-1] == ("unload", "b")
    bench.scheduler.on_unloaded("b")
    assert ("unload", "a") not in bench.effects.calls
    running.release()
    bench.scheduler.on_unloaded("a")
    assert bench.scheduler.empty and bench.ledger.granted_bytes == 0


def test_an_exclusive_ticket_runs_alone(bench: Bench) -> None:
    first = bench.bring_in("a", 30)
    bench.bring_in("b", 30).release()
    alone = bench.ask("a", exclusive=True, working_bytes=40)
    behind = bench.ask("a")
    assert alone.waits and behind.waits
    assert bench.effects.calls[-1] == ("unload", "b")
    bench.scheduler.on_unloaded("b")
    assert alone.waits
    first.release()
    assert alone.lease is not None
    assert behind.waits
    alone.release()
    assert behind.lease is not None


# Events that come from within a callback.


def test_a_callback_may_come_back_with_another_event(bench: Bench) -> None:
    """What is left of the plan it interrupted is from before, and is decided again."""
    second = client("a", working_bytes=30)
    leases: list[Lease] = []

    def granted(lease: Lease) -> None:
        leases.append(lease)
        bench.scheduler.on_cancel(second.ticket)
        lease.release()
        leases[0].release()

    bench.scheduler.on_request(
        Ticket(
            request_id="first",
            model_id="a",
            operation="chat",
            on_granted=granted,
            on_refused=lambda error: pytest.fail(str(error)),
        )
    )
    bench.scheduler.on_request(second.ticket)
    third = bench.ask("a", working_bytes=60)
    bench.scheduler.on_estimate("a", estimate(40))
    bench.loaded("a", 40)
    assert len(leases) == 1
    assert second.waits, "a cancelled ticket was answered"
    assert third.lease is not None
    assert bench.model("a").leases == 1
    assert bench.ledger.granted_bytes == 100


def test_a_refused_client_may_cancel_another_that_is_about_to_be_refused(bench: Bench) -> None:
    second = client("a")

    def refused(error: EngineError) -> None:
        bench.scheduler.on_cancel(second.ticket)

    bench.scheduler.on_request(
        Ticket(
            request_id="first",
            model_id="a",
            operation="chat",
            on_granted=lambda lease: pytest.fail("granted"),
            on_refused=refused,
        )
    )
    bench.scheduler.on_request(second.ticket)
    bench.scheduler.on_estimate_failed("a", "gone")
    assert second.waits


def test_an_event_that_cannot_be_is_an_error(bench: Bench) -> None:
    impossible: list[Callable[[], None]] = [
        lambda: bench.loaded("a", 1),
        lambda: bench.scheduler.on_unloaded("a"),
        lambda: bench.scheduler.on_load_failed("a", LoadFailed("")),
    ]
    for act in impossible:
        with pytest.raises(RuntimeError, match="'a' is absent"):
            act()
    bench.scheduler.on_model_failed("a", "too late")
    assert bench.model("a").state is ModelState.ABSENT


# What it tells.


def test_status_tells_what_is(bench: Bench) -> None:
    bench.bring_in("a", 40, leases=1)
    bench.ask("a", request_id="batch", priority=Priority.BATCH)
    bench.clock.now += 1
    bench.ask("a", request_id="now", priority=Priority.INTERACTIVE)
    assert [(t.request_id, t.position, t.priority) for t in bench.scheduler.report.queue()] == [
        ("now", 1, "interactive"),
        ("batch", 2, "batch"),
    ]
    model = bench.model("a")
    assert (model.state, model.tier, model.device_bytes) == (ModelState.RESIDENT, "device", 40)
    assert (model.leases, model.waiting, model.created) == (1, 2, 7)
    assert [block.name for block in model.blocks] == ["weights"]
    assert (model.estimated_bytes, model.estimated_load_s) == (40, 2.0), "as measured"
    assert bench.model("b").tier == "disk"
    assert bench.model("b").estimated_bytes is None


def test_load_seconds_are_a_running_mean_of_what_was_measured(bench: Bench) -> None:
    bench.bring_in("a", 40).release()
    assert bench.model("a").estimated_load_s == 2.0, "the estimate counts for nothing now"
    bench.unload("a")
    bench.scheduler.on_unloaded("a")
    bench.ask("a")
    bench.loaded("a", 40, seconds=12.0)
    assert bench.model("a").estimated_load_s == pytest.approx(2 + 0.3 * 10)


def test_a_thousand_waiting_tickets_are_cheap(make: Make) -> None:
    """The bound is generous: it catches a plan that is quadratic in the queue."""
    bench = make("a", "b", max_queue_per_model=2000)
    bench.bring_in("a", 60, leases=1)
    for _ in range(1000):
        bench.ask("a")
        bench.ask("b")
    began = time.process_time()
    for _ in range(20):
        bench.ask("a", working_bytes=1, priority=Priority.INTERACTIVE)
    assert (time.process_time() - began) / 20 < 0.02
