"""Each rule of the decision by example, then what must hold for every snapshot."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.plan import Load, Park, Plan, RefusalCode, Unload
from engine.scheduling.planner import REMEASURE_S, forecast, plan, service_order
from engine.scheduling.snapshot import ModelView, PartView, Snapshot, TicketView
from engine.status import ModelState

NOW = 1000.0
OVERTAKE_S = 10.0
LONG_AGO = NOW - 100


def model(model_id: str, nbytes: int = 40, **changes: Any) -> ModelView:
    """A resident, idle, settled model."""
    view = ModelView(
        id=model_id,
        state=ModelState.RESIDENT,
        resident_bytes=nbytes,
        needed_bytes=nbytes,
        leases=0,
        leased_working_bytes=0,
        max_concurrency=4,
        pinned=False,
        resident_since=LONG_AGO,
        idle_since=NOW - 5,
        keep_alive_s=300.0,
        reload_s=10.0,
        demand=1.0,
    )
    if changes.get("leases"):
        changes.setdefault("idle_since", None)
    return replace(view, **changes)


def absent(model_id: str, nbytes: int = 40, **changes: Any) -> ModelView:
    return model(
        model_id,
        nbytes,
        **{
            "state": ModelState.ABSENT,
            "resident_bytes": 0,
            "resident_since": None,
            "idle_since": None,
            **changes,
        },
    )


def ticket(ticket_id: int, model_id: str, *, waited_s: float = 0.0, **changes: Any) -> TicketView:
    view = TicketView(
        id=ticket_id,
        model=model_id,
        working_bytes=0,
        priority=1,
        enqueued_at=NOW - waited_s,
        deadline=math.inf,
    )
    return replace(view, **changes)


def snapshot(
    models: list[ModelView], tickets: list[TicketView] | None = None, **changes: Any
) -> Snapshot:
    """100 bytes, of which the models hold what they say they hold."""
    capacity_bytes = changes.pop("capacity_bytes", 100)
    granted_bytes = sum(each.resident_bytes + each.leased_working_bytes for each in models)
    base = Snapshot(
        now=NOW,
        budget_bytes=100,
        capacity_bytes=capacity_bytes,
        free_bytes=capacity_bytes - granted_bytes,
        max_overtake_s=OVERTAKE_S,
        models=tuple(models),
        tickets=tuple(tickets or ()),
    )
    return replace(base, **changes)


def decide(
    models: list[ModelView], tickets: list[TicketView] | None = None, **changes: Any
) -> Plan:
    return plan(snapshot(models, tickets, **changes))


# Order.


def test_overdue_tickets_come_first_by_arrival_then_priority() -> None:
    tickets = [
        ticket(1, "a", waited_s=20, priority=2),
        ticket(2, "a", waited_s=10, priority=0),
        ticket(3, "a", waited_s=9, priority=1),
        ticket(4, "a", waited_s=8, priority=0),
        ticket(5, "a", waited_s=7, priority=1),
    ]
    order = service_order(tickets, NOW, OVERTAKE_S)
    assert [each.id for each in order] == [1, 2, 4, 3, 5]


# Grants.


def test_a_resident_model_grants_up_to_its_concurrency() -> None:
    decision = decide([model("a", leases=2)], [ticket(i, "a") for i in range(4)])
    assert decision.grants == (0, 1)
    assert decision.transition is None


def test_working_memory_is_granted_only_while_it_is_free() -> None:
    tickets = [ticket(i, "a", working_bytes=25) for i in range(3)]
    assert decide([model("a", 40)], tickets).grants == (0, 1)


def test_what_costs_nothing_is_granted_even_when_others_took_the_device() -> None:
    tickets = [ticket(1, "a"), ticket(2, "a", working_bytes=1)]
    decision = decide([model("a", 40)], tickets, capacity_bytes=20)
    assert decision.grants == (1,)
    assert decision.transition is None
    assert decision.wake_at == NOW + REMEASURE_S


def test_a_resident_model_serves_past_an_older_claim() -> None:
    """Same-model collation: the claim on b waits while a is in use."""
    models = [model("a", 80, leases=1), absent("b", 80)]
    decision = decide(models, [ticket(1, "b", waited_s=9), ticket(2, "a")])
    assert decision.grants == (2,)
    assert decision.transition is None
    assert decision.draining == frozenset()
    assert decision.wake_at == NOW + 1  # when the claim becomes overdue


# Refusals.


def test_a_passed_deadline_is_refused_and_a_coming_one_wakes() -> None:
    models = [model("a", leases=4), absent("b")]
    tickets = [
        ticket(1, "a", waited_s=5, deadline=NOW),
        ticket(2, "a", waited_s=4, deadline=NOW + 3),
    ]
    decision = decide(models, tickets)
    assert [(each.ticket_id, each.code) for each in decision.refusals] == [
        (1, RefusalCode.DEADLINE)
    ]
    assert decision.wake_at == NOW + 3


@pytest.mark.parametrize(
    ("waited_s", "told"),
    [(0.001, "1 ms"), (0.0014, "1.4 ms"), (0.25, "250 ms"), (1.5, "1.5 s"), (90.4, "90 s")],
)
def test_a_refusal_tells_how_long_it_waited(waited_s: float, told: str) -> None:
    decision = decide([model("a")], [ticket(1, "a", waited_s=waited_s, deadline=NOW)])
    assert [each.reason for each in decision.refusals] == [f"not served within {told}"]


def test_deadlines_count_behind_a_blocked_ticket_as_well() -> None:
    tickets = [
        ticket(1, "a", waited_s=5),
        ticket(2, "a", waited_s=5, deadline=NOW),
        ticket(3, "a", waited_s=4, deadline=NOW + 3),
        ticket(4, "a", waited_s=4, working_bytes=61),
    ]
    decision = decide([model("a", leases=4)], tickets)
    assert [(each.ticket_id, each.code) for each in decision.refusals] == [
        (2, RefusalCode.DEADLINE),
        (4, RefusalCode.NEVER_FITS),
    ]
    assert decision.wake_at == NOW + 3


def test_what_can_never_fit_beside_the_pinned_is_refused() -> None:
    models = [model("pinned", 30, pinned=True), absent("b", 60)]
    tickets = [ticket(1, "b", working_bytes=10), ticket(2, "b", working_bytes=11)]
    decision = decide(models, tickets)
    assert [(each.ticket_id, each.code) for each in decision.refusals] == [
        (2, RefusalCode.NEVER_FITS)
    ]
    assert decision.transition == Load("b")


def test_room_that_other_programs_hold_is_waited_for_without_blocking_anyone() -> None:
    models = [model("a", 30), absent("big", 90), absent("small", 40)]
    tickets = [ticket(1, "big", waited_s=50), ticket(2, "small")]
    decision = decide(models, tickets, capacity_bytes=80)
    assert decision.refusals == ()
    assert decision.transition == Load("small")
    assert decision.draining == frozenset()
    assert decision.wake_at == NOW + REMEASURE_S


# The claim.


def test_an_absent_model_is_loaded_into_free_room() -> None:
    assert decide([model("a"), absent("b")], [ticket(1, "b")]).transition == Load("b")


def test_only_one_transition_at_a_time() -> None:
    decision = decide([absent("a"), absent("b")], [ticket(1, "a"), ticket(2, "b")])
    assert decision.transition == Load("a")
    loading = model("a", state=ModelState.LOADING)
    assert decide([loading, absent("b")], [ticket(2, "b")], busy=True).transition is None


def test_a_model_whose_size_is_unknown_waits_and_blocks_nobody() -> None:
    models = [absent("a", needed_bytes=None), absent("b")]
    decision = decide(models, [ticket(1, "a", waited_s=50), ticket(2, "b")])
    assert decision.transition == Load("b")


@pytest.mark.parametrize(
    ("changes", "victim"),
    [
        ({"reload_s": 1.0}, "b"),
        ({"demand": 0.1}, "b"),
        ({"demand": 0.9, "idle_since": NOW - 50}, "b"),
        ({"idle_since": NOW - 50}, "b"),
        ({"idle_since": NOW - 1}, "a"),
        ({"pinned": True, "demand": 0.0}, "a"),
        ({"leases": 1, "demand": 0.0}, "a"),
    ],
)
def test_the_victim_is_the_idle_model_that_costs_least_to_bring_back(
    changes: dict[str, Any], victim: str
) -> None:
    models = [model("a", 45), model("b", 45, **changes), absent("c", 50)]
    decision = decide(models, [ticket(1, "c")])
    assert isinstance(decision.transition, Unload)
    assert decision.transition.model == victim


def test_bytes_freed_count_against_the_cost() -> None:
    models = [model("small", 30), model("large", 60), absent("c", 25)]
    decision = decide(models, [ticket(1, "c")])
    assert decision.transition == Unload("large", "making room for c")


def test_a_superfluous_victim_is_left_alone() -> None:
    """The cheap small model alone does not suffice, and the large one makes it superfluous."""
    models = [model("small", 20, demand=0.0), model("large", 75), absent("c", 70)]
    decision = decide(models, [ticket(1, "c")])
    assert decision.transition == Unload("large", "making room for c")


def test_nothing_is_evicted_where_it_would_not_suffice() -> None:
    models = [model("idle", 30), model("used", 60, leases=1), absent("c", 80)]
    decision = decide(models, [ticket(1, "c", waited_s=9)])
    assert decision.transition is None
    assert decision.wake_at == NOW + 1


def test_working_memory_that_does_not_fit_evicts_an_idle_model() -> None:
    models = [model("a", 40), model("b", 50)]
    decision = decide(models, [ticket(1, "a", working_bytes=30)])
    assert decision.grants == ()
    assert decision.transition == Unload("b", "making room for a")


def test_a_model_that_can_serve_its_waiting_tickets_is_no_victim() -> None:
    models = [model("a", 80), absent("b", 80)]
    decision = decide(models, [ticket(1, "b", waited_s=5), ticket(2, "a")])
    assert decision.grants == (2,)
    assert decision.transition is None


def test_of_two_dear_victims_the_dearest_superfluous_one_is_spared() -> None:
    models = [
        model("x", 20, reload_s=1.0, demand=0.2),
        model("y", 30, reload_s=1.0, demand=0.6),
        model("z", 50, reload_s=1.0, demand=2.0),
        absent("c", 60),
    ]
    assert decide(models, [ticket(1, "c")]).transition == Unload("x", "making room for c")


def test_a_model_of_no_bytes_is_no_victim() -> None:
    models = [model("empty", 0), model("a", 80), absent("b", 80)]
    assert decide(models, [ticket(1, "b")]).transition == Unload("a", "making room for b")


def test_the_claimant_is_not_its_own_victim_nor_does_it_expire() -> None:
    models = [
        model("a", 40, idle_since=NOW - 400),
        model("pinned", 30, pinned=True, leases=1, leased_working_bytes=30),
    ]
    decision = decide(models, [ticket(1, "a", waited_s=1, working_bytes=10)])
    assert decision.transition is None
    assert decision.wake_at == NOW + 9


def test_an_older_ticket_of_lower_priority_wakes_when_it_is_overdue() -> None:
    models = [model("a", 80, leases=1), absent("b", 80)]
    tickets = [ticket(1, "b", waited_s=3, priority=2), ticket(2, "b", priority=0)]
    assert decide(models, tickets).wake_at == NOW + 7


# The overdue claim.


def test_an_overdue_claim_drains_a_model_in_use() -> None:
    models = [model("a", 80, leases=1), absent("b", 80)]
    decision = decide(models, [ticket(1, "b", waited_s=10), ticket(2, "a", waited_s=1)])
    assert decision.grants == ()
    assert decision.transition is None, "a leased model is never evicted"
    assert decision.draining == {"a"}
    idle = [model("a", 80), absent("b", 80)]
    decision = decide(
        idle, [ticket(1, "b", waited_s=10), ticket(2, "a")], draining=frozenset({"a"})
    )
    assert decision.grants == ()
    assert decision.transition == Unload("a", "making room for b")


def test_tickets_older_than_the_claim_are_not_held_back() -> None:
    models = [model("a", 80, leases=1), absent("b", 80)]
    tickets = [ticket(1, "a", waited_s=12), ticket(2, "b", waited_s=11), ticket(3, "a")]
    assert decide(models, tickets).grants == (1,)


def test_a_model_just_loaded_is_not_drained_before_its_turn() -> None:
    """Without this, two models under load would be swapped for every request."""
    models = [model("a", 80, leases=1, resident_since=NOW - 4), absent("b", 80)]
    tickets = [ticket(1, "b", waited_s=30), ticket(2, "a", waited_s=1)]
    decision = decide(models, tickets)
    assert decision.grants == (2,)
    assert decision.draining == frozenset()
    assert decision.wake_at == NOW + 6
    idle = [model("a", 80, resident_since=NOW - 4), absent("b", 80)]
    assert decide(idle, tickets).grants == (2,), "idle for a moment, but asked for"


def test_a_pinned_model_is_not_drained() -> None:
    models = [
        model("pinned", 40, leases=1, pinned=True),
        model("a", 40, leases=1),
        absent("b", 50),
    ]
    assert decide(models, [ticket(1, "b", waited_s=10)]).draining == {"a"}


def test_the_model_already_draining_stays_the_choice() -> None:
    models = [
        model("a", 45, leases=1, demand=5.0),
        model("b", 45, leases=1, demand=1.0),
        absent("c", 50),
    ]
    claim = [ticket(1, "c", waited_s=10)]
    assert decide(models, claim).draining == {"b"}
    assert decide(models, claim, draining=frozenset({"a"})).draining == {"a"}


def test_idle_models_leave_before_models_in_use_are_drained() -> None:
    models = [
        model("idle", 30, demand=9.0),
        model("b", 30, leases=1),
        model("c", 30, leases=1),
        absent("d", 70),
    ]
    decision = decide(models, [ticket(1, "d", waited_s=10)])
    assert decision.transition == Unload("idle", "making room for d")
    assert len(decision.draining) == 2


def test_what_is_being_unloaded_counts_as_coming_back() -> None:
    models = [
        model("leaving", 45, state=ModelState.UNLOADING),
        model("a", 45, leases=1),
        absent("c", 50),
    ]
    decision = decide(models, [ticket(1, "c", waited_s=10)], busy=True)
    assert decision.draining == frozenset()


def test_an_overdue_claim_holds_the_room_it_waits_for() -> None:
    models = [model("a", 40, leases=1, leased_working_bytes=30), absent("b", 50)]
    young = ticket(2, "a", working_bytes=20)
    assert decide(models, [ticket(1, "b", waited_s=9), young]).grants == (2,)
    decision = decide(models, [ticket(1, "b", waited_s=10), young, ticket(3, "a")])
    assert decision.grants == (3,), "only what costs no room passes"
    assert decision.draining == frozenset(), "the working memory comes back by itself"


def test_an_idle_model_leaves_at_once_rather_than_wait_for_working_memory() -> None:
    models = [model("a", 10, leases=1, leased_working_bytes=45), model("b", 40), absent("c", 45)]
    decision = decide(models, [ticket(1, "c", waited_s=10)])
    assert decision.transition == Unload("b", "making room for c")


def test_working_memory_granted_in_the_same_plan_comes_back_as_well() -> None:
    models = [model("a", 40), absent("b", 50)]
    tickets = [ticket(1, "a", waited_s=12, working_bytes=30), ticket(2, "b", waited_s=11)]
    decision = decide(models, tickets)
    assert decision.grants == (1,)
    assert decision.draining == frozenset()


def test_an_overdue_ticket_keeps_its_room_while_its_model_loads() -> None:
    models = [model("a", 40), model("b", 40, state=ModelState.LOADING)]
    tickets = [ticket(1, "b", waited_s=10, working_bytes=15), ticket(2, "a", working_bytes=10)]
    assert decide(models, tickets, busy=True).grants == ()
    tickets[0] = ticket(1, "b", waited_s=9, working_bytes=15)
    assert decide(models, tickets, busy=True).grants == (2,)


# Exclusive.


def test_an_exclusive_ticket_at_the_head_stops_the_rest_and_runs_alone() -> None:
    alone = ticket(1, "a", exclusive=True, working_bytes=30)
    other = ticket(2, "b")
    leased = [model("a", 40, leases=1), model("b", 40)]
    decision = decide(leased, [alone, other])
    assert decision.grants == ()
    assert decision.transition == Unload("b", "a must run alone")
    assert decide([model("a", 40, leases=1), absent("b")], [alone, other]).grants == ()
    decision = decide([model("a", 40), absent("b")], [alone, other])
    assert decision.grants == (1,)
    assert decision.transition is None
    leaving = [model("a", 40), model("b", 20, state=ModelState.UNLOADING)]
    assert decide(leaving, [alone, other], busy=True).grants == ()
    decision = decide([absent("a"), absent("b")], [alone, other])
    assert decision.transition == Load("a")


def test_a_later_exclusive_ticket_waits_for_its_turn_and_stops_nobody() -> None:
    models = [model("a", 40), model("b", 40)]
    tickets = [ticket(1, "b"), ticket(2, "a", exclusive=True), ticket(3, "b")]
    decision = decide(models, tickets)
    assert decision.grants == (1, 3)
    assert decision.transition is None
    assert decision.wake_at == NOW + OVERTAKE_S


def test_beside_a_running_exclusive_lease_nothing_is_granted_or_loaded() -> None:
    models = [model("a", 40, leases=1), absent("b")]
    tickets = [ticket(1, "a"), ticket(2, "b", waited_s=50)]
    decision = decide(models, tickets, exclusive_running=True)
    assert decision.grants == ()
    assert decision.transition is None

    second = ticket(3, "b", exclusive=True)
    decision = decide(models, [second], exclusive_running=True)
    assert decision.grants == ()
    assert decision.transition is None


def test_what_takes_no_bytes_runs_beside_an_exclusive_lease() -> None:
    models = [model("a", leases=1), model("cloud", 0), absent("later", 0)]
    tickets = [ticket(1, "a"), ticket(2, "cloud"), ticket(3, "later"), ticket(4, "cloud")]
    assert decide(models, tickets, exclusive_running=True).grants == (2, 4)
    lean = [ticket(1, "cloud", working_bytes=1)]
    assert decide(models, lean, exclusive_running=True).grants == ()


def test_what_takes_no_bytes_does_not_hold_up_an_exclusive_ticket() -> None:
    models = [model("a"), model("cloud", 0, leases=1)]
    assert decide(models, [ticket(1, "a", exclusive=True)]).grants == (1,)


def test_what_takes_no_bytes_never_leaves() -> None:
    cloud = model("cloud", 0, idle_since=LONG_AGO, keep_alive_s=1.0)
    assert decide([cloud]).transition is None
    assert decide([cloud], capacity_bytes=-50).transition is None
    assert decide([cloud, absent("a", 100)], [ticket(1, "a")]).transition == Load("a")


def test_an_exclusive_ticket_behind_others_wakes_when_it_is_overdue() -> None:
    tickets = [ticket(1, "a", waited_s=4), ticket(2, "a", waited_s=3, exclusive=True)]
    assert decide([model("a", leases=4)], tickets).wake_at == NOW + 7


def test_an_exclusive_ticket_loads_its_model_only_into_free_room() -> None:
    models = [model("dying", 60, leases=1, unload_reason="failed"), absent("a", 60)]
    assert decide(models, [ticket(1, "a", exclusive=True)]).transition is None


# Leaving.


def test_idle_models_leave_when_other_programs_took_their_room() -> None:
    models = [model("a", 40, demand=2.0), model("b", 40), model("pinned", 10, pinned=True)]
    decision = decide(models, capacity_bytes=60)
    assert decision.transition == Unload("b", "other programs use its memory")
    some = [model("a", 40), model("used", 40, leases=1)]
    decision = decide(some, capacity_bytes=20)
    assert decision.transition == Unload("a", "other programs use its memory")
    used = [model("a", 40, leases=1), model("pinned", 10, pinned=True)]
    assert decide(used, capacity_bytes=20).transition is None


def test_keep_alive_ends_and_is_woken_for() -> None:
    decision = decide([model("a", idle_since=NOW - 300), model("b", idle_since=NOW - 299)])
    assert decision.transition == Unload("a", "idle for 300 s")
    decision = decide([model("b", idle_since=NOW - 299)])
    assert decision.transition is None
    assert decision.wake_at == NOW + 1


@pytest.mark.parametrize("changes", [{"pinned": True}, {"keep_alive_s": math.inf}, {"leases": 1}])
def test_what_is_pinned_kept_for_ever_or_in_use_does_not_expire(changes: dict[str, Any]) -> None:
    decision = decide([replace(model("a", idle_since=NOW - 1e6), **changes)])
    assert decision.transition is None
    assert decision.wake_at is None


def test_a_model_that_must_leave_gets_no_grants_and_leaves_when_idle_even_if_pinned() -> None:
    failed = model("a", pinned=True, leases=1, unload_reason="failed: cuda")
    assert decide([failed], [ticket(1, "a")]) == Plan((), (), None, frozenset(), None)
    idle = replace(failed, leases=0, idle_since=NOW)
    assert decide([idle], [ticket(1, "a")]).transition == Unload("a", "failed: cuda")


def test_a_pinned_model_that_must_leave_reserves_nothing() -> None:
    failed = model("a", 60, pinned=True, leases=1, unload_reason="failed: cuda")
    assert decide([failed, absent("b", 60)], [ticket(1, "b")]).refusals == ()


# Parts, host copies and what a request may ask of them.


def parked(model_id: str, nbytes: int = 40, **changes: Any) -> ModelView:
    """All of it off the device; a wake takes a tenth of a load."""
    base = {"state": ModelState.PARKED, "resident_bytes": 0, "needed_bytes": nbytes}
    return model(model_id, nbytes, **{**base, "wake_s": 1.0, "host_bytes": nbytes, **changes})


WEIGHTS_AND_CACHE = (PartView("weights", 30, 1.0), PartView("kv_cache", 10, 0.0))


def test_a_batch_leaves_alone_what_others_asked_for_last() -> None:
    """The KV cache of the chat would cost nothing to bring back."""
    chat = model("chat", 50, parts=(PartView("kv_cache", 30, 0.0),), used_at=NOW - 1)
    old = model("old", 40, used_at=NOW - 60)
    models = [chat, old, absent("new", 40)]
    assert decide(models, [ticket(1, "new")]).transition == Park(
        "chat", frozenset({"kv_cache"}), "making room for new"
    )
    batch = ticket(2, "new", priority=2)
    assert decide(models, [batch]).transition == Unload("old", "making room for new")
    outlook = forecast(snapshot(models), batch)
    assert [each.model for each in outlook.evictions] == ["old"]
    # Where the others do not suffice, it leaves too.
    models = [chat, model("small", 10, used_at=NOW - 60), absent("new", 80)]
    assert [each.model for each in forecast(snapshot(models), batch).evictions] == ["chat"]


def test_a_kv_cache_leaves_before_any_weights() -> None:
    cheap = model("a", 20, demand=0.01, parts=(PartView("weights", 20, 0.5),))
    llm = model("b", 40, parts=WEIGHTS_AND_CACHE)
    decision = decide([cheap, llm, absent("c", 50)], [ticket(1, "c")])
    assert decision.transition == Park("b", frozenset({"kv_cache"}), "making room for c")


def test_only_the_parts_that_are_needed_leave() -> None:
    flux = model("a", 90, parts=(PartView("text_encoder", 40, 1.0), PartView("unet", 50, 1.3)))
    decision = decide([flux, absent("b", 45)], [ticket(1, "b")])
    assert decision.transition == Park("a", frozenset({"text_encoder"}), "making room for b")


def test_what_cannot_be_parked_takes_its_model_with_it() -> None:
    llm = model("a", 60, parts=(PartView("kv_cache", 20, 0.0),))
    decision = decide([llm, absent("b", 50)], [ticket(1, "b")])
    assert decision.transition == Park("a", frozenset({"kv_cache"}), "making room for b")
    decision = decide([llm, absent("b", 70)], [ticket(1, "b")])
    assert decision.transition == Unload("a", "making room for b")


def test_a_parked_model_comes_back_for_what_it_lacks() -> None:
    half = parked("a", 60, resident_bytes=40)
    assert decide([half, model("b", 40)], [ticket(1, "a")]).transition == Load("a")
    taken = model("b", 50)
    decision = decide([half, taken], [ticket(1, "a")])
    assert decision.transition == Unload("b", "making room for a")


def test_what_is_left_of_a_parked_model_can_leave_too() -> None:
    half = parked("a", 60, resident_bytes=40, parts=(PartView("unet", 40, 1.0),))
    decision = decide([half, absent("b", 70)], [ticket(1, "b")])
    assert decision.transition == Park("a", frozenset({"unet"}), "making room for b")


def test_an_idle_model_is_parked_after_its_keep_alive() -> None:
    old = model("a", 40, parts=WEIGHTS_AND_CACHE, idle_since=NOW - 301)
    decision = decide([old], [])
    assert decision.transition == Park("a", frozenset({"weights", "kv_cache"}), "idle for 301 s")
    asked = model("a", 40, parts=WEIGHTS_AND_CACHE, park_reason="asked to")
    assert decide([asked], []).transition == Park(
        "a", frozenset({"weights", "kv_cache"}), "asked to"
    )


def test_the_host_copy_that_saves_least_makes_room_for_another() -> None:
    models = [
        parked("a", 40, demand=1.0),
        parked("b", 40, demand=0.1),
        absent("c", 40, host_bytes=40),
    ]
    decision = decide(models, [ticket(1, "c")], host_free_bytes=20)
    assert decision.transition == Unload("b", "its host copy makes room for that of c")
    assert decide(models, [ticket(1, "c")], host_free_bytes=40).transition == Load("c")


def test_a_host_copy_worth_more_than_the_next_one_stays() -> None:
    models = [parked("a", 40, demand=5.0), absent("c", 40, host_bytes=40, demand=0.1)]
    assert decide(models, [ticket(1, "c")], host_free_bytes=20).transition == Load("c")


def test_no_model_leaves_for_a_request_that_forbids_it() -> None:
    models = [model("a", 60), absent("b", 60)]
    decision = decide(models, [ticket(1, "b", no_evict=True, waited_s=30)])
    assert decision.transition is None
    decision = decide(models, [ticket(1, "b", no_evict=True), ticket(2, "b")])
    assert decision.transition == Unload("a", "making room for b")
    decision = decide([absent("b", 60)], [ticket(1, "b", no_evict=True)])
    assert decision.transition == Load("b")


@pytest.mark.parametrize("there", [absent("a"), parked("a")])
def test_a_request_for_loaded_models_only_does_not_wait(there: ModelView) -> None:
    decision = decide([there], [ticket(1, "a", if_loaded_only=True)])
    assert [refusal.code for refusal in decision.refusals] == [RefusalCode.NOT_LOADED]
    assert decide([model("a")], [ticket(1, "a", if_loaded_only=True)]).grants == (1,)


def test_and_does_not_wait_behind_others_of_its_model_either() -> None:
    loaded_only = ticket(2, "a", if_loaded_only=True)
    decision = decide([absent("a")], [ticket(1, "a"), loaded_only])
    assert [refusal.ticket_id for refusal in decision.refusals] == [2]


def test_the_model_that_comes_next_is_named_while_it_must_wait() -> None:
    waits = decide([model("a", 60, leases=1), absent("b", 60)], [ticket(1, "b")])
    assert (waits.transition, waits.next_model) == (None, "b")
    comes = decide([absent("b", 60)], [ticket(1, "b")])
    assert (comes.transition, comes.next_model) == (Load("b"), None)
    from_the_host = decide([model("a", 60, leases=1), parked("b", 60)], [ticket(1, "b")])
    assert from_the_host.next_model is None


def hold(ticket_id: int, *names: str, **changes: Any) -> TicketView:
    return ticket(ticket_id, names[0], hold=True, further_models=names[1:], **changes)


class TestHolds:
    """Sessions that keep several models."""

    def test_all_or_none(self) -> None:
        there = [model("a", 30), model("b", 30)]
        assert decide(there, [hold(1, "a", "b")]).grants == (1,)
        assert decide([there[0], absent("b", 30)], [hold(1, "a", "b")]).grants == ()

    def test_it_takes_no_place(self) -> None:
        full = model("a", max_concurrency=1, leases=1)
        assert decide([full], [hold(1, "a"), hold(2, "a"), ticket(3, "a")]).grants == (1, 2)

    def test_room_for_all_is_made_before_the_first_is_brought_in(self) -> None:
        models = [absent("a", 40), absent("b", 40), model("c", 30)]
        decision = decide(models, [hold(1, "a", "b")])
        assert decision.transition == Unload("c", "making room for a and b")
        assert decide(models[:2], [hold(1, "a", "b")]).transition == Load("a")
        assert decide([model("a", 40), *models[1:2]], [hold(1, "a", "b")]).transition == Load("b")

    def test_its_own_models_do_not_leave_for_it(self) -> None:
        models = [model("a", 40, demand=0.0), absent("b", 40), model("c", 40)]
        for waited_s in (0, 2 * OVERTAKE_S):
            decision = decide(models, [hold(1, "b", "a", waited_s=waited_s)])
            assert decision.transition == Unload("c", "making room for b and a")

    def test_its_models_do_not_expire_while_it_waits(self) -> None:
        models = [model("a", idle_since=NOW - 400), absent("b", needed_bytes=None)]
        assert decide(models, [hold(1, "b", "a")]).transition is None

    def test_it_waits_for_a_model_that_leaves_for_an_older_request(self) -> None:
        models = [model("a", 60, leases=1), absent("b", 60)]
        tickets = [ticket(1, "b", waited_s=2 * OVERTAKE_S), hold(2, "a", waited_s=1)]
        decision = decide(models, tickets)
        assert decision.draining == {"a"}
        assert decision.grants == ()

    def test_an_overdue_one_holds_the_room_that_it_waits_for(self) -> None:
        models = [absent("a", 40), absent("b", 30), model("c", 40, leases=1), model("d", 10)]
        tickets = [hold(1, "a", "b", waited_s=2 * OVERTAKE_S), ticket(2, "d", working_bytes=30)]
        decision = decide(models, tickets)
        assert decision.draining == {"c"}
        assert decision.grants == ()

    def test_one_that_loads_holds_the_room_of_the_rest(self) -> None:
        loading = model("a", 40, state=ModelState.LOADING, resident_since=None, idle_since=None)
        models = [loading, absent("b", 40), model("c", 10)]
        tickets = [hold(1, "a", "b", waited_s=2 * OVERTAKE_S), ticket(2, "c", working_bytes=15)]
        assert decide(models, tickets, busy=True).grants == ()

    def test_what_is_kept_leaves_for_nobody(self) -> None:
        models = [model("a", 60, holds=1), absent("b", 60), absent("c", 40)]
        overdue = ticket(1, "b", waited_s=2 * OVERTAKE_S)
        decision = decide(models, [overdue, ticket(2, "c")])
        assert decision.refusals == ()
        assert decision.draining == frozenset()
        assert decision.transition == Load("c")

    def test_exclusive_requests_run_beside_what_is_kept(self) -> None:
        models = [model("a", 40, holds=1), model("b", 40)]
        assert decide(models, [ticket(1, "b", exclusive=True)]).grants == (1,)

    def test_a_kept_model_that_failed_leaves(self) -> None:
        models = [model("a", holds=1, unload_reason="failed: out of memory")]
        assert decide(models).transition == Unload("a", "failed: out of memory")

    @pytest.mark.parametrize(
        ("others", "code"),
        [
            ([model("c", 30, pinned=True)], RefusalCode.NEVER_FITS),
            ([model("c", 30, holds=1)], RefusalCode.HELD),
            ([absent("c", 30, holds=1)], RefusalCode.HELD),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(
        self, others: list[ModelView], code: RefusalCode
    ) -> None:
        models = [absent("a", 40), absent("b", 40), *others]
        decision = decide(models, [hold(1, "a", "b")])
        assert [(each.code, each.reason) for each in decision.refusals] == [
            (code, "needs 80 B; at most 70 B can be freed")
        ]

    def test_one_that_may_not_bring_anything_in(self) -> None:
        models = [model("a", 40), absent("b", 40), model("c", 20)]
        decision = decide(models, [hold(1, "a", "b", if_loaded_only=True)])
        assert [each.code for each in decision.refusals] == [RefusalCode.NOT_LOADED]
        assert decide(models, [hold(1, "a", "b", no_evict=True)]).transition == Load("b")
        models[2] = model("c", 21)
        assert decide(models, [hold(1, "a", "b", no_evict=True)]).transition is None

    def test_the_forecast(self) -> None:
        models = [model("a", 40), absent("b", 40), model("c", 30)]
        outlook = forecast(snapshot(models), hold(1, "a", "b"))
        assert (outlook.fits, outlook.wanted_bytes) == (True, 40)
        assert [each.model for each in outlook.evictions] == ["c"]
        models[2] = model("c", 30, holds=1)
        outlook = forecast(snapshot(models), hold(1, "a", "b"))
        assert (outlook.fits, outlook.evictions) == (True, ())
        assert "sessions" in outlook.reason
        models[2] = model("c", 30, pinned=True)
        assert not forecast(snapshot(models), hold(1, "a", "b")).fits
        models = [model("a", 40), model("b", 40)]
        assert forecast(snapshot(models), hold(1, "a", "b")).reason == "it is there"


class TestForecast:
    def test_what_leaves_and_how_much_is_wanted(self) -> None:
        before = snapshot([model("a", 40, parts=WEIGHTS_AND_CACHE), absent("b", 65)])
        outlook = forecast(before, ticket(1, "b", working_bytes=5))
        assert (outlook.fits, outlook.wanted_bytes) == (True, 70)
        assert [(each.model, each.blocks, each.nbytes) for each in outlook.evictions] == [
            ("a", ("kv_cache",), 10)
        ]

    def test_models_in_use_are_named_with_the_wait(self) -> None:
        outlook = forecast(snapshot([model("a", 60, leases=1), absent("b", 65)]), ticket(1, "b"))
        assert [each.reason for each in outlook.evictions] == ["in use"]
        assert "idle first" in outlook.reason

    def test_what_never_fits(self) -> None:
        before = snapshot([model("a", 60, pinned=True), absent("b", 65)])
        outlook = forecast(before, ticket(1, "b"))
        assert not outlook.fits
        assert "40 B" in outlook.reason

    def test_nothing_leaves_for_what_is_there(self) -> None:
        outlook = forecast(snapshot([model("a", 60), model("b", 40)]), ticket(1, "b"))
        assert (outlook.wanted_bytes, outlook.evictions, outlook.reason) == (0, (), "it is there")


# For every snapshot.

MOVING = (ModelState.LOADING, ModelState.WAKING, ModelState.PARKING, ModelState.UNLOADING)


@st.composite
def model_views(draw: st.DrawFn, model_id: str) -> ModelView:
    state = draw(st.sampled_from(ModelState))
    resident = state is ModelState.RESIDENT
    loaded = state in (ModelState.RESIDENT, ModelState.PARKED, ModelState.PARKING)
    leases = draw(st.integers(0, 3)) if resident else 0
    parts = tuple(
        PartView(name, draw(st.integers(0, 30)), draw(st.floats(0, 5)))
        for name in (["weights", "kv_cache"][: draw(st.integers(0, 2))] if loaded else [])
    )
    part_bytes = sum(part.nbytes for part in parts)
    rest_bytes = 0 if state is ModelState.ABSENT else draw(st.integers(0, 60))
    leaving_bytes = draw(st.integers(0, rest_bytes)) if state is ModelState.PARKING else 0
    needed_bytes = draw(st.one_of(st.none(), st.integers(0, 120)))
    if state in (ModelState.PARKED, ModelState.PARKING):  # it was measured when it was loaded
        needed_bytes = rest_bytes + part_bytes + draw(st.integers(0, 60))
    return ModelView(
        id=model_id,
        state=state,
        resident_bytes=rest_bytes + part_bytes,
        needed_bytes=needed_bytes,
        leases=leases,
        leased_working_bytes=draw(st.integers(0, 20)) if leases else 0,
        max_concurrency=draw(st.integers(1, 4)),
        pinned=draw(st.booleans()),
        holds=draw(st.sampled_from([0, 0, 0, 1])),
        resident_since=NOW - draw(st.sampled_from([0, 5, 10, 50])) if resident else None,
        idle_since=NOW - draw(st.sampled_from([0, 5, 400])) if resident and not leases else None,
        keep_alive_s=draw(st.sampled_from([0.0, 300.0, math.inf])),
        reload_s=draw(st.floats(0, 100)),
        demand=draw(st.floats(0, 10)),
        unload_reason=draw(st.sampled_from([None, None, None, "asked to"])) if loaded else None,
        park_reason=draw(st.sampled_from([None, None, "asked to"])) if loaded else None,
        parts=parts,
        leaving_bytes=leaving_bytes,
        wake_s=sum(part.wake_s for part in parts),
        host_bytes=draw(st.integers(0, 60)),
    )


@st.composite
def ticket_views(draw: st.DrawFn, ids: list[str], number: int, waited_s: float) -> TicketView:
    hold = draw(st.integers(0, 4)) == 4
    names = draw(st.permutations(ids))
    return TicketView(
        id=number,
        model=names[0],
        further_models=tuple(names[1 : draw(st.integers(1, len(ids)))]) if hold else (),
        hold=hold,
        working_bytes=0 if hold else draw(st.sampled_from([0, 0, 5, 20, 50])),
        priority=draw(st.integers(0, 2)),
        enqueued_at=NOW - waited_s,
        deadline=NOW + draw(st.sampled_from([-1, 0, 5, math.inf])),
        exclusive=not hold and draw(st.integers(0, 9)) == 0,
        no_evict=draw(st.integers(0, 5)) == 0,
        if_loaded_only=draw(st.integers(0, 5)) == 0,
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    ids = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    models = [draw(model_views(model_id)) for model_id in ids]
    waits_s = sorted(draw(st.lists(st.sampled_from([0, 3, 9, 10, 11, 40]), max_size=12)))
    tickets = [
        draw(ticket_views(ids, number, waited_s))
        for number, waited_s in enumerate(reversed(waits_s))
    ]
    return replace(
        snapshot(models, tickets, capacity_bytes=draw(st.integers(0, 200))),
        budget_bytes=200,
        busy=any(m.state in MOVING for m in models),
        host_free_bytes=draw(st.integers(0, 60)),
        exclusive_running=sum(m.leases for m in models) == 1 and draw(st.booleans()),
        draining=frozenset(draw(st.sets(st.sampled_from(ids)))),
    )


@given(snapshots())
def test_no_plan_breaks_a_promise(before: Snapshot) -> None:
    decision = plan(before)
    assert plan(before) == decision, "the same snapshot, another plan"
    views = {view.id: view for view in before.models}
    tickets = {each.id: each for each in before.tickets}
    refused = {refusal.ticket_id for refusal in decision.refusals}
    assert refused.isdisjoint(decision.grants)
    assert len(set(decision.grants)) == len(decision.grants)

    for each in before.tickets:
        states = {views[name].state for name in each.models}
        if each.if_loaded_only and states & {ModelState.ABSENT, ModelState.PARKED}:
            assert each.id in refused, "it waits for a load that it must not cause"

    granted = [tickets[number] for number in decision.grants]
    assert sum(each.working_bytes for each in granted) <= max(0, before.free_bytes)
    leases = {view.id: view.leases for view in before.models}
    kept = {view.id for view in before.models if view.holds}
    for each in granted:
        for name in each.models:
            assert views[name].state is ModelState.RESIDENT
            assert views[name].unload_reason is None
        assert each.deadline > before.now
        if each.hold:
            kept |= {*each.models}
            continue
        leases[each.model] += 1
        assert leases[each.model] <= views[each.model].max_concurrency
    if any(each.exclusive for each in granted) or (before.exclusive_running and granted):
        assert sum(leases.values()) == 1
        assert not before.exclusive_running

    if decision.transition is not None:
        assert not before.busy
        view = views[decision.transition.model]
        free_bytes = before.free_bytes - sum(each.working_bytes for each in granted)
        if isinstance(decision.transition, Load):
            assert view.state in (ModelState.ABSENT, ModelState.PARKED)
            assert view.needed_bytes is not None
            assert view.needed_bytes - view.resident_bytes <= free_bytes
        else:
            assert view.state in (ModelState.RESIDENT, ModelState.PARKED)
            assert leases[view.id] == 0, "a leased model would be evicted"
            assert not view.pinned or view.unload_reason is not None
            assert view.id not in kept or view.unload_reason is not None
        if isinstance(decision.transition, Park):
            assert decision.transition.blocks
            assert decision.transition.blocks <= {part.name for part in view.parts}
        elif isinstance(decision.transition, Unload) and view.unload_reason is None:
            rest_bytes = view.resident_bytes - sum(part.nbytes for part in view.parts)
            assert rest_bytes > 0 or view.state is ModelState.PARKED, "parking would do"
    for model_id in decision.draining:
        assert not views[model_id].pinned
        assert not views[model_id].holds
    assert decision.wake_at is None or decision.wake_at > before.now


@given(snapshots())
def test_a_waiting_ticket_always_has_something_to_wait_for(before: Snapshot) -> None:
    """Nothing done, nothing under way, nothing running and no alarm set would be for ever."""
    before = replace(
        before,
        tickets=tuple(replace(each, deadline=math.inf, no_evict=False) for each in before.tickets),
    )
    decision = plan(before)
    sizes_unknown = {
        view.id
        for view in before.models
        if view.needed_bytes is None and view.state is ModelState.ABSENT
    }
    answered = {*decision.grants, *(refusal.ticket_id for refusal in decision.refusals)}
    waiting = [
        each
        for each in before.tickets
        if each.id not in answered and sizes_unknown.isdisjoint(each.models)
    ]
    used = any(view.leases or view.holds for view in before.models)
    if waiting and not before.busy and not used:
        acts = decision.grants or decision.transition is not None
        assert acts or decision.wake_at is not None, waiting
