"""The decision: from what is, to what to do next.

`plan` is a pure function. It reads no clock and writes no log, because it is
asked speculatively as well, and the same snapshot always gives the same plan.

How it decides:

- **Order.** Tickets that have waited `max_overtake_s` come first, oldest first;
  then the others by priority and arrival.
- **Grants.** A ticket whose model is resident, below its concurrency, and whose
  working memory is free is granted, even past older tickets for other models:
  that is how one swap is paid by many requests.
- **The claim** is the first ticket that lacks room: its model is absent, or its
  working memory does not fit. Idle models leave for it, the cheapest to bring
  back first. Only one model is loaded or unloaded at a time, because what an
  eviction gave back is measured before the next decision.
- **An overdue claim** holds the room it waits for. If idle models do not
  suffice, models in use are *drained*: younger tickets for them wait, and they
  leave when their last lease ends. A model is drained only once it has been
  resident for `max_overtake_s`; otherwise two models that do not fit together
  would, under load on both, be swapped for every single request.
- **An exclusive ticket** that is first in order runs alone on the device.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter

from engine.status import ModelState
from engine.units import format_size

REMEASURE_S = 1.0
"""How soon to look again when only other programs can give the room that a ticket needs."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One configured model, as the decision sees it."""

    id: str
    state: ModelState
    resident_bytes: int
    """Granted for its blocks, or for its reservation while it loads; 0 when absent."""
    needed_bytes: int | None
    """What a load takes, as estimated or last measured; None while unknown."""
    leases: int
    leased_working_bytes: int
    max_concurrency: int
    pinned: bool
    resident_since: float | None
    idle_since: float | None
    """When the last lease ended; None while absent or in use."""
    keep_alive_s: float
    reload_s: float
    demand: float
    """Expected requests per second."""
    unload_reason: str | None = None
    """Why the model must leave as soon as it is idle, pinned or not; None while it may stay."""


@dataclass(frozen=True, slots=True)
class TicketView:
    """One waiting request, as the decision sees it."""

    id: int
    model: str
    working_bytes: int
    priority: int
    """Lower is served first."""
    enqueued_at: float
    deadline: float
    """When it is refused; `math.inf` for never."""
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the decision depends on. Times are seconds on one monotonic clock."""

    now: float
    budget_bytes: int
    capacity_bytes: int
    free_bytes: int
    """Capacity less granted; negative when others took what was granted."""
    max_overtake_s: float
    models: tuple[ModelView, ...]
    tickets: tuple[TicketView, ...]
    """In order of arrival."""
    busy: bool = False
    """A load or unload is under way."""
    exclusive_running: bool = False
    draining: frozenset[str] = frozenset()
    """`Plan.draining` of the plan before."""


class RefusalCode(StrEnum):
    """Why a ticket is refused."""

    DEADLINE = "deadline"
    NEVER_FITS = "never_fits"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket that is not served."""

    ticket_id: int
    code: RefusalCode
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a model in."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Take an idle model out."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: the grants and refusals first, then the transition."""

    grants: tuple[int, ...]
    refusals: tuple[Refusal, ...]
    transition: Load | Unload | None
    draining: frozenset[str]
    """Models whose younger tickets are held back for the claim."""
    wake_at: float | None
    """The earliest time at which time alone could change the decision."""


def plan(snapshot: Snapshot) -> Plan:
    """Decide what to grant, refuse, load and unload now.

    O(tickets · log tickets + models · log models).
    """
    return _Decision(snapshot).plan()


def service_order(
    tickets: Sequence[TicketView], now: float, max_overtake_s: float
) -> list[TicketView]:
    """Sort tickets, given in order of arrival, into the order in which they are considered."""
    overdue = bisect_right(tickets, now, key=lambda ticket: ticket.enqueued_at + max_overtake_s)
    return [*tickets[:overdue], *sorted(tickets[overdue:], key=attrgetter("priority"))]


class _Model:
    """A model while the decision is being made: the view, and what was decided so far."""

    __slots__ = (
        "base_bytes", "budget_bytes", "capacity_bytes", "closed", "held", "leases", "room_held",
        "view",
    )  # fmt: skip

    def __init__(self, view: ModelView, snapshot: Snapshot, pinned_bytes: int) -> None:
        self.view = view
        self.leases = view.leases
        self.closed = False
        """Whatever else is decided, no later ticket of it is granted."""
        self.held = False
        """Its tickets that come later in the order are held back."""
        self.room_held = False
        """Room is held for its first overdue ticket while it loads."""
        granted = view.state in (ModelState.LOADING, ModelState.RESIDENT)
        self.base_bytes = view.resident_bytes if granted else view.needed_bytes
        pinned_others = pinned_bytes - (view.resident_bytes if _stays(view) else 0)
        self.budget_bytes = snapshot.budget_bytes - pinned_others
        self.capacity_bytes = snapshot.capacity_bytes - pinned_others

    @property
    def resident(self) -> bool:
        """It is there and may stay."""
        return self.view.state is ModelState.RESIDENT and self.view.unload_reason is None

    @property
    def ample_bytes(self) -> int:
        """Working memory up to which a ticket is neither refused nor waits for other programs."""
        return min(self.budget_bytes, self.capacity_bytes) - (self.base_bytes or 0)

    @property
    def evictable(self) -> bool:
        return self.resident and not self.view.pinned

    @property
    def cost(self) -> float:
        """Seconds of reloading that its absence is expected to cost, per second."""
        return self.view.reload_s * self.view.demand


class _Decision:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        pinned_bytes = sum(view.resident_bytes for view in snapshot.models if _stays(view))
        self.models = {view.id: _Model(view, snapshot, pinned_bytes) for view in snapshot.models}
        self.asked_for = {ticket.model for ticket in snapshot.tickets}
        self.free_bytes = snapshot.free_bytes
        self.held_bytes = 0
        """Of the free bytes, those that only the claim may take."""
        self.leased_bytes = sum(view.leased_working_bytes for view in snapshot.models)
        self.returning_bytes = sum(
            view.resident_bytes
            for view in snapshot.models
            if view.state is ModelState.UNLOADING or view.unload_reason is not None
        )
        self.grants: list[int] = []
        self.refusals: list[Refusal] = []
        self.head: TicketView | None = None
        """The first ticket in order that could be served at all."""
        self.frozen = snapshot.exclusive_running
        """Nothing (more) is granted."""
        self.claim: TicketView | None = None
        self.claim_bytes = 0
        self.victims: list[_Model] | None = None
        """Chosen for the claim and held back; None while nothing is held."""
        self.wake_at = math.inf

    def plan(self) -> Plan:
        snapshot = self.snapshot
        now, max_overtake_s = snapshot.now, snapshot.max_overtake_s
        for ticket in service_order(snapshot.tickets, now, max_overtake_s):
            model = self.models[ticket.model]
            # The short way past a long queue: most tickets wait behind one that was blocked.
            if (
                model.closed
                and ticket.deadline > now
                and not ticket.exclusive
                and ticket.working_bytes <= model.ample_bytes
            ):
                overdue_at = ticket.enqueued_at + max_overtake_s
                if now < overdue_at < self.wake_at and not model.resident:
                    self.wake_at = overdue_at
                if ticket.deadline < self.wake_at:
                    self.wake_at = ticket.deadline
            elif not self._settle(ticket, model):
                self._wake(ticket.deadline)
        transition = self._transition()
        return Plan(
            grants=tuple(self.grants),
            refusals=tuple(self.refusals),
            transition=None if snapshot.busy else transition,
            draining=frozenset(model.view.id for model in self.models.values() if model.held),
            wake_at=self.wake_at if self.wake_at < math.inf else None,
        )

    def _settle(self, ticket: TicketView, model: _Model) -> bool:
        """Grant or refuse the ticket; False leaves it waiting."""
        if ticket.deadline <= self.snapshot.now:
            waited_s = self.snapshot.now - ticket.enqueued_at
            reason = f"not served within {waited_s:.0f} s"
            self.refusals.append(Refusal(ticket.id, RefusalCode.DEADLINE, reason))
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
                # Other programs hold its room. It must not hold up those that can be served.
                self._wake(self.snapshot.now + REMEASURE_S)
                return False
        if self.head is None:
            self.head = ticket
        if self.frozen:
            return False
        if ticket.exclusive:
            return self._settle_exclusive(ticket, model)
        if (
            model.resident
            and not model.held
            and model.leases < model.view.max_concurrency
            and (
                ticket.working_bytes == 0
                or ticket.working_bytes <= self.free_bytes - self.held_bytes
            )
        ):
            self._grant(ticket, model)
            return True
        self._block(ticket, model)
        return False

    def _grant(self, ticket: TicketView, model: _Model) -> None:
        self.grants.append(ticket.id)
        model.leases += 1
        self.free_bytes -= ticket.working_bytes
        self.leased_bytes += ticket.working_bytes

    def _settle_exclusive(self, ticket: TicketView, model: _Model) -> bool:
        if ticket is not self.head:
            self._wake(ticket.enqueued_at + self.snapshot.max_overtake_s)
            return False
        self.frozen = True
        others = [other for other in self.models.values() if other is not model and other.evictable]
        for other in others:
            other.held = True
        if others or self.snapshot.busy or any(each.leases for each in self.models.values()):
            return False
        if not model.resident or ticket.working_bytes > self.free_bytes:
            return False
        self._grant(ticket, model)
        return True

    def _block(self, ticket: TicketView, model: _Model) -> None:
        """Find out whether the ticket lacks room, and what that asks for."""
        view = model.view
        if model.resident and not model.held and model.leases < view.max_concurrency:
            if ticket.working_bytes <= self.free_bytes:
                return  # it would fit, but the room is held for the claim
        else:
            model.closed = True
            if view.state is ModelState.RESIDENT:
                return
        overdue_at = ticket.enqueued_at + self.snapshot.max_overtake_s
        overdue = overdue_at <= self.snapshot.now
        self._wake(overdue_at)
        if view.state is ModelState.LOADING:
            if overdue and not model.room_held:
                model.room_held = True
                self.held_bytes += ticket.working_bytes
            return
        if self.claim is not None:
            return
        self.claim = ticket
        self.claim_bytes = ticket.working_bytes
        if not model.resident:
            self.claim_bytes += model.base_bytes or 0
        if overdue:
            self.victims = self._victims_of_overdue(model)
        if self.victims is not None:
            for victim in self.victims:
                victim.held = True
            self.held_bytes += self.claim_bytes

    @property
    def _deficit_bytes(self) -> int:
        """What the claim still lacks once everything already leaving has left."""
        return self.claim_bytes - self.free_bytes - self.returning_bytes

    def _victims_of_overdue(self, claimant: _Model) -> list[_Model] | None:
        """The models that must leave for an overdue claim; None if it must wait for now."""
        idle: list[_Model] = []
        leased: list[_Model] = []
        for model in self.models.values():
            if model is claimant or not model.evictable:
                continue
            settled_at = (model.view.resident_since or 0.0) + self.snapshot.max_overtake_s
            settled = settled_at <= self.snapshot.now
            if model.leases == 0 and (settled or model.view.id not in self.asked_for):
                idle.append(model)
            elif settled:
                leased.append(model)
            else:
                self._wake(settled_at)
        # Where idle models do not suffice, working memory is counted on first: it comes back by
        # itself once younger tickets no longer take it, and no model must be drained for it.
        after_leases = self._deficit_bytes - self.leased_bytes
        for deficit_bytes, candidates in (
            (self._deficit_bytes, idle),
            (after_leases, idle + leased),
        ):
            chosen = self._least_costly(candidates, deficit_bytes)
            if chosen is not None:
                return chosen
        return None

    def _least_costly(self, candidates: list[_Model], deficit_bytes: int) -> list[_Model] | None:
        """A sufficient set of models, those to evict first in front; None if all do not suffice.

        Takes the lowest cost per byte freed first, then leaves out, dearest
        first, whatever a later and larger pick made superfluous.
        """
        if deficit_bytes <= 0:
            return []
        draining = self.snapshot.draining
        picks: list[_Model] = []
        surplus_bytes = -deficit_bytes
        for model in sorted(
            (model for model in candidates if model.view.resident_bytes > 0),
            key=lambda model: (
                model.view.id not in draining,
                model.leases > 0,
                model.cost / model.view.resident_bytes,
                model.view.idle_since or 0.0,
            ),
        ):
            if surplus_bytes >= 0:
                break
            picks.append(model)
            surplus_bytes += model.view.resident_bytes
        if surplus_bytes < 0:
            return None
        for model in sorted(
            picks,
            key=lambda model: (
                model.view.id not in draining,
                model.leases > 0,
                model.cost,
                model.view.resident_bytes,
            ),
            reverse=True,
        ):
            if model.view.resident_bytes <= surplus_bytes:
                picks.remove(model)
                surplus_bytes -= model.view.resident_bytes
        return picks

    def _transition(self) -> Load | Unload | None:
        for model in self.models.values():
            view = model.view
            leaving = view.state is ModelState.RESIDENT and view.unload_reason is not None
            if leaving and model.leases == 0:
                return Unload(view.id, view.unload_reason or "")
        return (
            self._yield_to_others()
            or self._serve_exclusive()
            or self._serve_claim()
            or self._expire()
        )

    def _yield_to_others(self) -> Unload | None:
        """Other programs took what is granted here: give it up, as far as it is idle."""
        if self.free_bytes >= 0:
            return None
        idle = self._idle()
        chosen = self._least_costly(idle, -self.free_bytes) or idle
        return _first_idle(chosen, "other programs use its memory")

    def _serve_exclusive(self) -> Load | Unload | None:
        if self.head is None or not self.head.exclusive or self.snapshot.exclusive_running:
            return None
        model = self.models[self.head.model]
        others = [other for other in self.models.values() if other.held]
        if others:
            return _first_idle(others, f"{model.view.id} must run alone")
        wanted_bytes = (model.base_bytes or 0) + self.head.working_bytes
        if model.view.state is ModelState.ABSENT and wanted_bytes <= self.free_bytes:
            return Load(model.view.id)
        return None

    def _serve_claim(self) -> Load | Unload | None:
        if self.claim is None:
            return None
        model = self.models[self.claim.model]
        victims = self.victims
        if victims is None:
            victims = self._least_costly(self._idle(but=model), self._deficit_bytes)
        if victims:
            return _first_idle(victims, f"making room for {model.view.id}")
        if model.view.state is ModelState.ABSENT and self.claim_bytes <= self.free_bytes:
            return Load(model.view.id)
        return None

    def _expire(self) -> Unload | None:
        """Take out the first model that nobody asked for in its keep-alive time."""
        now = self.snapshot.now
        for model in self._idle():
            view = model.view
            if view.idle_since is None or view.id in self.asked_for:
                continue
            expires_at = view.idle_since + view.keep_alive_s
            if expires_at <= now:
                return Unload(view.id, f"idle for {now - view.idle_since:.0f} s")
            self._wake(expires_at)
        return None

    def _idle(self, but: _Model | None = None) -> list[_Model]:
        return [
            model
            for model in self.models.values()
            if model.evictable and model.leases == 0 and model is not but
        ]

    def _wake(self, when: float) -> None:
        if self.snapshot.now < when < self.wake_at:
            self.wake_at = when


def _stays(view: ModelView) -> bool:
    """Its bytes cannot be had for another model, whatever happens."""
    granted = view.state in (ModelState.LOADING, ModelState.RESIDENT)
    return view.pinned and granted and view.unload_reason is None


def _first_idle(models: Iterable[_Model], reason: str) -> Unload | None:
    for model in models:
        if model.leases == 0:
            return Unload(model.view.id, reason)
    return None
