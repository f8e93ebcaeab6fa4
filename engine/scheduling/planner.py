"""The planner: from a snapshot of models and tickets to what to do next.

`plan` is a pure function. It reads no clock and writes no log, because it is also called
speculatively. The same snapshot always gives the same plan.

How it decides:

- **Order.** Tickets that have waited `max_overtake_s` come first, oldest first; then the
  others by priority and arrival.
- **Grants.** A ticket is granted if its model is resident and below its concurrency, and its
  working memory is free. It may pass older tickets for other models: so many requests share
  the cost of one swap.
- **The claim** is the first ticket that lacks room: its model is not there, or its working
  memory does not fit. Blocks of idle models leave for it, the cheapest to bring back first
  and no more than it takes (`victims.py`). They are *parked* if the model can be woken from
  its host copy; otherwise the model is unloaded. Only one model moves at a time, because
  what an eviction freed is measured before the next plan.
- **Host copies** are made while host memory lasts. For a new one, parked models of which the
  copies save less time are unloaded.
- **An overdue claim** holds the room that it waits for. If idle models do not suffice, models
  in use are *drained*: younger tickets for them wait, and they leave when their last lease
  ends. A model is drained only once it is settled: resident for `max_overtake_s`. Otherwise
  two models that do not fit together would, under load on both, swap for every request.
- **An exclusive ticket** that is first in order runs alone on the device.
- **A hold** is one ticket for several models. It is granted once all are resident, and is the claim
  for all of them at once until then: room for all is made before the first is brought in. Held
  models stay, as pinned ones do. Exclusive tickets run beside them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from engine.requests import Priority
from engine.scheduling.plan import (
    Load,
    Outlook,
    Plan,
    Refusal,
    RefusalCode,
    Transition,
    Unload,
)
from engine.scheduling.planned_model import PlannedModel, kept_for_sessions, stays
from engine.scheduling.snapshot import Snapshot, TicketView
from engine.scheduling.victims import Victim, first_idle, host_victims, least_costly, whole
from engine.status import COMPLETE, Eviction, ModelState
from engine.units import format_duration, format_size

REMEASURE_S = 1.0
"""When to measure again if only other programs can free the room that a ticket needs."""


def plan(snapshot: Snapshot) -> Plan:
    """Decide what to grant, refuse, load and unload now.

    O(tickets · log tickets + models · log models).
    """
    return _Decision(snapshot).plan()


def forecast(snapshot: Snapshot, ticket: TicketView) -> Outlook:
    """What would be done for the ticket if no other waited."""
    return _Decision(snapshot).forecast(ticket)


def service_order(
    tickets: Sequence[TicketView], now: float, max_overtake_s: float
) -> list[TicketView]:
    """Sort tickets, given in order of arrival, into the order in which `plan` considers them."""
    overdue = bisect_right(tickets, now, key=lambda ticket: ticket.enqueued_at + max_overtake_s)
    return [*tickets[:overdue], *sorted(tickets[overdue:], key=attrgetter("priority"))]


class _Decision:
    """A plan in the making: the snapshot, and what was decided so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        pinned_bytes = sum(view.resident_bytes for view in snapshot.models if stays(view))
        self.kept_bytes = sum(kept_for_sessions(view) for view in snapshot.models)
        self.models = {
            view.id: PlannedModel(view, snapshot, pinned_bytes, self.kept_bytes)
            for view in snapshot.models
        }
        self.asked_for = {name for ticket in snapshot.tickets for name in ticket.models}
        self.free_bytes = snapshot.free_bytes
        self.held_bytes = 0
        """The part of the free bytes that only the claim may take."""
        self.leased_bytes = sum(view.leased_working_bytes for view in snapshot.models)
        self.returning_bytes = sum(
            view.leaving_bytes if view.state is ModelState.PARKING else view.resident_bytes
            for view in snapshot.models
            if view.state in (ModelState.UNLOADING, ModelState.PARKING)
            or view.unload_reason is not None
        )
        self.grants: list[int] = []
        self.refusals: list[Refusal] = []
        self.head: TicketView | None = None
        """The first ticket in order that can be served at all."""
        self.frozen = snapshot.exclusive_running
        """No (further) ticket is granted."""
        self.claim: TicketView | None = None
        self.claim_bytes = 0
        self.victims: list[Victim] | None = None
        """Chosen for an overdue claim, and held back; None while no room is held."""
        self.wake_at = math.inf

    def plan(self) -> Plan:
        snapshot = self.snapshot
        now, max_overtake_s = snapshot.now, snapshot.max_overtake_s
        for ticket in service_order(snapshot.tickets, now, max_overtake_s):
            model = self.models[ticket.model]
            # The short way through a long queue: most tickets wait behind a blocked one.
            if (
                model.closed
                and not ticket.hold
                and ticket.deadline > now
                and not ticket.exclusive
                and not (ticket.if_loaded_only and model.can_come)
                and ticket.working_bytes <= model.ample_bytes
            ):
                overdue_at = ticket.enqueued_at + max_overtake_s
                if now < overdue_at < self.wake_at and not model.resident:
                    self.wake_at = overdue_at
                if ticket.deadline < self.wake_at:
                    self.wake_at = ticket.deadline
            elif not self._decide(ticket, model):
                self._wake(ticket.deadline)
        transition = self._transition()
        return Plan(
            grants=tuple(self.grants),
            refusals=tuple(self.refusals),
            transition=None if snapshot.busy else transition,
            draining=frozenset(model.view.id for model in self.models.values() if model.held),
            next_model=self._next_model(transition),
            wake_at=self.wake_at if self.wake_at < math.inf else None,
        )

    def _next_model(self, transition: Transition | None) -> str | None:
        """The model of the claim, while other models must leave first."""
        if self.claim is None or (isinstance(transition, Load) and not self.snapshot.busy):
            return None
        for model in self._of(self.claim):
            if model.view.state is ModelState.ABSENT:
                return model.view.id
        return None

    def _of(self, ticket: TicketView) -> tuple[PlannedModel, ...]:
        """The models of a ticket."""
        return tuple(self.models[name] for name in ticket.models)

    def forecast(self, ticket: TicketView) -> Outlook:
        members = self._of(ticket)
        if any(model.base_bytes is None for model in members):
            return Outlook(True, None, (), "its files have not been read yet")
        wanted_bytes = ticket.working_bytes + sum(
            model.incoming_bytes for model in members if model.view.state not in COMPLETE
        )
        budget_bytes = self.snapshot.budget_bytes - self._staying_bytes(members)
        if self._base_bytes(members) + ticket.working_bytes > budget_bytes:
            most = format_size(max(0, budget_bytes))
            return Outlook(False, wanted_bytes, (), f"at most {most} can be freed for it")
        self.claim_bytes = wanted_bytes
        others = [
            other for other in self.models.values() if other.evictable and other not in members
        ]
        reason = ""
        victims = self._victims_of(ticket, self._idle(but=members))
        if victims is None:
            victims = least_costly(others, self._deficit_bytes, self.snapshot.draining)
            reason = "models in use must become idle first"
        if victims is None:
            victims = [whole(other) for other in others]
            reason = "requests that run must give their working memory back first"
            if any(other.holds for other in self.models.values() if other not in members):
                reason = "sessions that keep models, or requests that run, must end first"
        if not reason:
            there = all(model.resident for model in members)
            reason = "it is there" if there and not wanted_bytes else "it fits"
            if victims:
                reason = "idle models leave for it"
        evictions = tuple(
            Eviction(
                victim.model.view.id,
                tuple(sorted(victim.blocks or ())),
                victim.nbytes,
                "in use" if victim.model.leases else "the least costly to bring back",
            )
            for victim in victims
        )
        return Outlook(True, wanted_bytes, evictions, reason)

    def _decide(self, ticket: TicketView, model: PlannedModel) -> bool:
        """Grant or refuse the ticket, or return False: it goes on waiting."""
        if ticket.deadline <= self.snapshot.now:
            waited_s = ticket.waited_s + self.snapshot.now - ticket.enqueued_at
            reason = f"not served within {format_duration(waited_s)}"
            self.refusals.append(Refusal(ticket.id, RefusalCode.DEADLINE, reason))
            return True
        if ticket.hold:
            return self._decide_hold(ticket, self._of(ticket))
        if ticket.if_loaded_only and model.can_come:
            self.refusals.append(Refusal(ticket.id, RefusalCode.NOT_LOADED, "is not loaded"))
            return True
        if model.base_bytes is None:
            return False
        if ticket.working_bytes or not model.resident:
            wanted_bytes = model.base_bytes + ticket.working_bytes
            if wanted_bytes > model.budget_bytes:
                reason = (
                    f"needs {format_size(wanted_bytes)}; at most "
                    f"{format_size(max(0, model.budget_bytes))} can be freed"
                )
                self.refusals.append(Refusal(ticket.id, RefusalCode.NEVER_FITS, reason))
                return True
            if wanted_bytes > model.capacity_bytes:
                # Other programs or sessions keep the room for it. Others must not wait behind it.
                self._wake(self.snapshot.now + REMEASURE_S)
                return False
        if self.head is None:
            self.head = ticket
        if self.frozen and (ticket.working_bytes or not model.weightless):
            return False
        if ticket.exclusive:
            return self._decide_exclusive(ticket, model)
        if (
            model.resident
            and not model.held
            and model.has_place
            and (
                ticket.working_bytes == 0
                or ticket.working_bytes <= self.free_bytes - self.held_bytes
            )
        ):
            self._grant(ticket, model)
            return True
        self._block(ticket, model)
        return False

    def _decide_hold(self, ticket: TicketView, members: tuple[PlannedModel, ...]) -> bool:
        if ticket.if_loaded_only and any(model.can_come for model in members):
            self.refusals.append(Refusal(ticket.id, RefusalCode.NOT_LOADED, "is not loaded"))
            return True
        if any(model.base_bytes is None for model in members):
            return False
        missing = [model for model in members if not model.resident]
        if missing:
            wanted_bytes, staying_bytes = self._base_bytes(members), self._staying_bytes(members)
            own_bytes = sum(kept_for_sessions(model.view) for model in members)
            others_bytes = self.kept_bytes - own_bytes
            left_bytes = self.snapshot.budget_bytes - staying_bytes
            code = RefusalCode.NEVER_FITS
            if wanted_bytes <= left_bytes:
                left_bytes -= others_bytes
                code = RefusalCode.HELD
            if wanted_bytes > left_bytes:
                reason = (
                    f"needs {format_size(wanted_bytes)}; at most "
                    f"{format_size(max(0, left_bytes))} can be freed"
                )
                self.refusals.append(Refusal(ticket.id, code, reason))
                return True
            if wanted_bytes > self.snapshot.capacity_bytes - staying_bytes - others_bytes:
                self._wake(self.snapshot.now + REMEASURE_S)
                return False
        if self.head is None:
            self.head = ticket
        if self.frozen and not all(model.weightless for model in members):
            return False
        if not missing and not any(model.held for model in members):
            self.grants.append(ticket.id)
            for model in members:
                model.holds += 1
            return True
        if missing:
            self._block_hold(ticket, members, missing)
        return False

    def _block_hold(
        self, ticket: TicketView, members: tuple[PlannedModel, ...], missing: list[PlannedModel]
    ) -> None:
        """Let a hold become the claim for all of its models that are not there."""
        overdue_at = ticket.enqueued_at + self.snapshot.max_overtake_s
        overdue = overdue_at <= self.snapshot.now
        self._wake(overdue_at)
        coming = [m for m in missing if m.view.state in (ModelState.LOADING, ModelState.WAKING)]
        if coming:
            if overdue and not coming[0].room_held:
                coming[0].room_held = True
                self.held_bytes += sum(m.incoming_bytes for m in missing if m not in coming)
            return
        if self.claim is not None:
            return
        claim_bytes = sum(model.incoming_bytes for model in missing)
        if ticket.no_evict and claim_bytes > self.free_bytes:
            return
        self.claim = ticket
        self.claim_bytes = claim_bytes
        if overdue:
            self.victims = self._victims_of_overdue(members)
        if self.victims is not None:
            for victim in self.victims:
                victim.model.held = True
            self.held_bytes += self.claim_bytes

    @staticmethod
    def _base_bytes(members: Sequence[PlannedModel]) -> int:
        """Of all of these models, once they are there."""
        return sum(model.base_bytes or 0 for model in members)

    def _staying_bytes(self, members: Sequence[PlannedModel]) -> int:
        """Of pinned models beside these."""
        return sum(
            model.view.resident_bytes
            for model in self.models.values()
            if model not in members and stays(model.view)
        )

    def _grant(self, ticket: TicketView, model: PlannedModel) -> None:
        self.grants.append(ticket.id)
        model.leases += 1
        self.free_bytes -= ticket.working_bytes
        self.leased_bytes += ticket.working_bytes

    def _decide_exclusive(self, ticket: TicketView, model: PlannedModel) -> bool:
        if ticket is not self.head:
            self._wake(ticket.enqueued_at + self.snapshot.max_overtake_s)
            return False
        self.frozen = True
        others = [other for other in self.models.values() if other is not model and other.evictable]
        for other in others:
            other.held = True
        running = (each for each in self.models.values() if each.leases and not each.weightless)
        if others or self.snapshot.busy or any(running):
            return False
        if not model.resident or ticket.working_bytes > self.free_bytes:
            return False
        self._grant(ticket, model)
        return True

    def _block(self, ticket: TicketView, model: PlannedModel) -> None:
        """Find out whether the ticket lacks room; if so, it may become the claim."""
        view = model.view
        if model.resident and not model.held and model.has_place:
            if ticket.working_bytes <= self.free_bytes:
                return  # it would fit, but the room is held for the claim
        else:
            # A later ticket for the model may be allowed to make room.
            model.closed = not ticket.no_evict
            if view.state is ModelState.RESIDENT:
                return
        overdue_at = ticket.enqueued_at + self.snapshot.max_overtake_s
        overdue = overdue_at <= self.snapshot.now
        self._wake(overdue_at)
        if view.state in (ModelState.LOADING, ModelState.WAKING):
            if overdue and not model.room_held:
                model.room_held = True
                self.held_bytes += ticket.working_bytes
            return
        if self.claim is not None:
            return
        claim_bytes = ticket.working_bytes
        if not model.resident:
            claim_bytes += model.incoming_bytes
        if ticket.no_evict and claim_bytes > self.free_bytes:
            return  # it waits until other models leave without it
        self.claim = ticket
        self.claim_bytes = claim_bytes
        if overdue:
            self.victims = self._victims_of_overdue((model,))
        if self.victims is not None:
            for victim in self.victims:
                victim.model.held = True
            model.turn_held = model.resident
            self.held_bytes += self.claim_bytes

    @property
    def _deficit_bytes(self) -> int:
        """What the claim still lacks once everything that is leaving has left."""
        return self.claim_bytes - self.free_bytes - self.returning_bytes

    def _victims_of(
        self, ticket: TicketView, candidates: list[PlannedModel]
    ) -> list[Victim] | None:
        """The least costly victims for the ticket; None if all candidates do not suffice.

        For a batch leaves first what others have not asked for the longest. Even a KV cache, which
        costs nothing to bring back, is not taken from a model that somebody talks to.
        """
        deficit_bytes, draining = self._deficit_bytes, self.snapshot.draining
        if ticket.priority == Priority.BATCH:
            candidates = sorted(candidates, key=lambda model: model.view.used_at)
            for count in range(1, len(candidates)):
                chosen = least_costly(candidates[:count], deficit_bytes, draining)
                if chosen is not None:
                    return chosen
        return least_costly(candidates, deficit_bytes, draining)

    def _victims_of_overdue(self, claimants: Sequence[PlannedModel]) -> list[Victim] | None:
        """The victims of an overdue claim; None if it must wait for now."""
        idle: list[PlannedModel] = []
        leased: list[PlannedModel] = []
        for model in self.models.values():
            if model in claimants or not model.evictable:
                continue
            settled_at = (model.view.resident_since or 0.0) + self.snapshot.max_overtake_s
            settled = settled_at <= self.snapshot.now
            if model.leases == 0 and (settled or model.view.id not in self.asked_for):
                idle.append(model)
            elif settled:
                leased.append(model)
            else:
                self._wake(settled_at)
        # Where idle models do not suffice, count on leased working memory first: it comes back
        # once younger tickets no longer take it, and no model must be drained for it.
        after_leases = self._deficit_bytes - self.leased_bytes
        for deficit_bytes, candidates in (
            (self._deficit_bytes, idle),
            (after_leases, idle + leased),
        ):
            chosen = least_costly(candidates, deficit_bytes, self.snapshot.draining)
            if chosen is not None:
                return chosen
        return None

    def _transition(self) -> Transition | None:
        for model in self.models.values():
            view = model.view
            there = view.state in (ModelState.RESIDENT, ModelState.PARKED)
            if there and view.unload_reason is not None and model.leases == 0:
                return Unload(view.id, view.unload_reason)
        return (
            self._yield_to_others()
            or self._serve_exclusive()
            or self._serve_claim()
            or self._expire()
        )

    def _yield_to_others(self) -> Transition | None:
        """Give up idle models if other programs took what is granted here."""
        if self.free_bytes >= 0:
            return None
        idle = self._idle()
        chosen = least_costly(idle, -self.free_bytes, self.snapshot.draining)
        if chosen is None:
            chosen = [whole(model) for model in idle]
        return first_idle(chosen, "other programs use its memory")

    def _serve_exclusive(self) -> Transition | None:
        if self.head is None or not self.head.exclusive or self.snapshot.exclusive_running:
            return None
        model = self.models[self.head.model]
        others = [whole(other) for other in self.models.values() if other.held]
        if others:
            return first_idle(others, f"{model.view.id} must run alone")
        wanted_bytes = model.incoming_bytes + self.head.working_bytes
        if model.can_come and wanted_bytes <= self.free_bytes:
            return self._bring_in(model)
        return None

    def _serve_claim(self) -> Transition | None:
        if self.claim is None:
            return None
        members = self._of(self.claim)
        victims = self.victims
        if victims is None:
            victims = self._victims_of(self.claim, self._idle(but=members))
        if victims:
            return first_idle(victims, f"making room for {' and '.join(self.claim.models)}")
        if self.claim_bytes <= self.free_bytes:
            for model in members:
                if model.can_come:
                    return self._bring_in(model)
        return None

    def _bring_in(self, model: PlannedModel) -> Load | Unload:
        """Load or wake the model; before a load, drop host copies that are worth less."""
        view = model.view
        if view.state is ModelState.ABSENT:
            lacking_bytes = view.host_bytes - self.snapshot.host_free_bytes
            unasked = [each for each in self.models.values() if each.view.id not in self.asked_for]
            others = host_victims(model, unasked, lacking_bytes)
            if others:
                reason = f"its host copy makes room for that of {view.id}"
                return Unload(others[0].view.id, reason)
        return Load(view.id)

    def _expire(self) -> Transition | None:
        """Evict the first idle model with a request to park it, or past its keep-alive."""
        now = self.snapshot.now
        for model in self._idle():
            view = model.view
            if view.id in self.asked_for:
                continue
            if view.park_reason is not None:
                return whole(model).leave(view.park_reason)
            if view.idle_since is None:
                continue
            expires_at = view.idle_since + view.keep_alive_s
            if expires_at <= now:
                return whole(model).leave(f"idle for {now - view.idle_since:.0f} s")
            self._wake(expires_at)
        return None

    def _idle(self, but: Sequence[PlannedModel] = ()) -> list[PlannedModel]:
        return [
            model
            for model in self.models.values()
            if model.evictable and model.leases == 0 and model not in but
        ]

    def _wake(self, when: float) -> None:
        if self.snapshot.now < when < self.wake_at:
            self.wake_at = when
