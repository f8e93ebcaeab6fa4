"""The decision: from what is, to what to do next.

`plan` is a pure function. It reads no clock and writes no log, because it is
asked speculatively as well, and the same snapshot always gives the same plan.

How it decides:

- **Order.** Tickets that have waited `max_overtake_s` come first, oldest first;
  then the others by priority and arrival.
- **Grants.** A ticket whose model is resident, below its concurrency, and whose
  working memory is free is granted, even past older tickets for other models:
  that is how one swap is paid by many requests.
- **The claim** is the first ticket that lacks room: its model is not there, or its
  working memory does not fit. Blocks of idle models leave for it, the cheapest to
  bring back first and no more than it takes: they are *parked*, if the model can be
  woken from its host copy, else the model is unloaded. Only one model is moved at a
  time, because what an eviction gave back is measured before the next decision.
- **Host copies** are made while host memory lasts. For a new one, parked models that
  save less time leave altogether.
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
from operator import attrgetter

from engine.scheduling.plan import (
    Load,
    Outlook,
    Park,
    Plan,
    Refusal,
    RefusalCode,
    Transition,
    Unload,
)
from engine.scheduling.snapshot import ModelView, Snapshot, TicketView
from engine.status import COMPLETE, Eviction, ModelState
from engine.units import format_size

REMEASURE_S = 1.0
"""How soon to look again when only other programs can give the room that a ticket needs."""


def plan(snapshot: Snapshot) -> Plan:
    """Decide what to grant, refuse, load and unload now.

    O(tickets · log tickets + models · log models).
    """
    return _Decision(snapshot).plan()


def forecast(snapshot: Snapshot, ticket: TicketView) -> Outlook:
    """What would be done for the ticket if it were the only one that waits."""
    return _Decision(snapshot).forecast(ticket)


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
        "turn_held", "view",
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
        self.turn_held = False
        """One of its places is held for the claim, whose working memory does not fit yet."""
        granted = view.state in COMPLETE
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
    def has_place(self) -> bool:
        """One more of its tickets may run beside those that do."""
        return self.leases + self.turn_held < self.view.max_concurrency

    @property
    def can_come(self) -> bool:
        """It could be brought in, if there is room."""
        return self.view.state in (ModelState.ABSENT, ModelState.PARKED)

    @property
    def incoming_bytes(self) -> int:
        """What bringing it in takes, once what is leaving of it has left."""
        view = self.view
        parked = view.state in (ModelState.PARKED, ModelState.PARKING)
        staying_bytes = view.resident_bytes - view.leaving_bytes if parked else 0
        return (self.base_bytes or 0) - staying_bytes

    @property
    def evictable(self) -> bool:
        view = self.view
        parked = view.state is ModelState.PARKED and view.unload_reason is None
        return (self.resident or parked) and view.resident_bytes > 0 and not view.pinned

    def pieces(self) -> list[_Piece]:
        """What can leave of it separately."""
        view = self.view
        pieces = [
            _Piece(self, part.name, part.nbytes, part.wake_s * view.demand) for part in view.parts
        ]
        rest_bytes = view.resident_bytes - sum(piece.nbytes for piece in pieces)
        if rest_bytes > 0:
            pieces.append(_Piece(self, None, rest_bytes, view.reload_s * view.demand))
        return pieces


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Bytes that can leave the device together."""

    model: _Model
    block: str | None
    """None: what only unloading the model gives back."""
    nbytes: int
    cost: float
    """Seconds of bringing back that its absence is expected to cost, per second."""


@dataclass(frozen=True, slots=True, eq=False)
class _Victim:
    """A model, and what is to leave of it."""

    model: _Model
    blocks: frozenset[str] | None
    """None: all of it, and the model is unloaded."""
    nbytes: int

    def leave(self, reason: str) -> Unload | Park:
        if self.blocks is None:
            return Unload(self.model.view.id, reason)
        return Park(self.model.view.id, self.blocks, reason)


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
            view.leaving_bytes if view.state is ModelState.PARKING else view.resident_bytes
            for view in snapshot.models
            if view.state in (ModelState.UNLOADING, ModelState.PARKING)
            or view.unload_reason is not None
        )
        self.grants: list[int] = []
        self.refusals: list[Refusal] = []
        self.head: TicketView | None = None
        """The first ticket in order that could be served at all."""
        self.frozen = snapshot.exclusive_running
        """Nothing (more) is granted."""
        self.claim: TicketView | None = None
        self.claim_bytes = 0
        self.victims: list[_Victim] | None = None
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
            next_model=self._next_model(transition),
            wake_at=self.wake_at if self.wake_at < math.inf else None,
        )

    def _next_model(self, transition: Transition | None) -> str | None:
        """The claim's model, while it must wait for others to leave."""
        if self.claim is None or (isinstance(transition, Load) and not self.snapshot.busy):
            return None
        view = self.models[self.claim.model].view
        return view.id if view.state is ModelState.ABSENT else None

    def forecast(self, ticket: TicketView) -> Outlook:
        model = self.models[ticket.model]
        if model.base_bytes is None:
            return Outlook(True, None, (), "its files have not been read yet")
        wanted_bytes = ticket.working_bytes
        if model.view.state not in COMPLETE:
            wanted_bytes += model.incoming_bytes
        if model.base_bytes + ticket.working_bytes > model.budget_bytes:
            most = format_size(max(0, model.budget_bytes))
            return Outlook(False, wanted_bytes, (), f"at most {most} can be freed for it")
        self.claim_bytes = wanted_bytes
        others = [other for other in self.models.values() if other.evictable and other is not model]
        reason = ""
        victims = self._least_costly(self._idle(but=model), self._deficit_bytes)
        if victims is None:
            victims = self._least_costly(others, self._deficit_bytes)
            reason = "models in use must become idle first"
        if victims is None:
            victims = [_whole(other) for other in others]
            reason = "requests that run must give their working memory back first"
        if not reason:
            reason = "it is there" if model.resident and not wanted_bytes else "it fits"
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

    def _settle(self, ticket: TicketView, model: _Model) -> bool:
        """Grant or refuse the ticket; False leaves it waiting."""
        if ticket.deadline <= self.snapshot.now:
            waited_s = self.snapshot.now - ticket.enqueued_at
            reason = f"not served within {waited_s:.0f} s"
            self.refusals.append(Refusal(ticket.id, RefusalCode.DEADLINE, reason))
            return True
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
        if model.resident and not model.held and model.has_place:
            if ticket.working_bytes <= self.free_bytes:
                return  # it would fit, but the room is held for the claim
        else:
            # Another ticket of it may be allowed to make room.
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
            return  # it waits until others leave by themselves
        self.claim = ticket
        self.claim_bytes = claim_bytes
        if overdue:
            self.victims = self._victims_of_overdue(model)
        if self.victims is not None:
            for victim in self.victims:
                victim.model.held = True
            model.turn_held = model.resident
            self.held_bytes += self.claim_bytes

    @property
    def _deficit_bytes(self) -> int:
        """What the claim still lacks once everything already leaving has left."""
        return self.claim_bytes - self.free_bytes - self.returning_bytes

    def _victims_of_overdue(self, claimant: _Model) -> list[_Victim] | None:
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

    def _least_costly(self, candidates: list[_Model], deficit_bytes: int) -> list[_Victim] | None:
        """What is to leave, those first in front; None if all the candidates do not suffice.

        Takes the pieces of lowest cost per byte first (a KV cache costs nothing to bring back),
        then leaves out, dearest first, whatever a later and larger pick made superfluous.
        """
        if deficit_bytes <= 0:
            return []
        draining = self.snapshot.draining
        picks: list[_Piece] = []
        surplus_bytes = -deficit_bytes
        pieces = [piece for model in candidates for piece in model.pieces() if piece.nbytes > 0]
        for piece in sorted(
            pieces,
            key=lambda piece: (
                piece.model.view.id not in draining,
                piece.model.leases > 0,
                piece.cost / piece.nbytes,
                piece.model.view.idle_since or 0.0,
            ),
        ):
            if surplus_bytes >= 0:
                break
            picks.append(piece)
            surplus_bytes += piece.nbytes
        if surplus_bytes < 0:
            return None
        for piece in sorted(
            picks,
            key=lambda piece: (
                piece.model.view.id not in draining,
                piece.model.leases > 0,
                piece.cost,
                piece.nbytes,
            ),
            reverse=True,
        ):
            if piece.nbytes <= surplus_bytes:
                picks.remove(piece)
                surplus_bytes -= piece.nbytes
        return _by_model(picks)

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
        """Other programs took what is granted here: give it up, as far as it is idle."""
        if self.free_bytes >= 0:
            return None
        idle = self._idle()
        chosen = self._least_costly(idle, -self.free_bytes)
        if chosen is None:
            chosen = [_whole(model) for model in idle]
        return _first_idle(chosen, "other programs use its memory")

    def _serve_exclusive(self) -> Transition | None:
        if self.head is None or not self.head.exclusive or self.snapshot.exclusive_running:
            return None
        model = self.models[self.head.model]
        others = [_whole(other) for other in self.models.values() if other.held]
        if others:
            return _first_idle(others, f"{model.view.id} must run alone")
        wanted_bytes = model.incoming_bytes + self.head.working_bytes
        if model.can_come and wanted_bytes <= self.free_bytes:
            return self._bring_in(model)
        return None

    def _serve_claim(self) -> Transition | None:
        if self.claim is None:
            return None
        model = self.models[self.claim.model]
        victims = self.victims
        if victims is None:
            victims = self._least_costly(self._idle(but=model), self._deficit_bytes)
        if victims:
            return _first_idle(victims, f"making room for {model.view.id}")
        if model.can_come and self.claim_bytes <= self.free_bytes:
            return self._bring_in(model)
        return None

    def _bring_in(self, model: _Model) -> Load | Unload:
        """Load or wake the model, once host copies worth less have made room for its own."""
        view = model.view
        if view.state is ModelState.ABSENT:
            lacking_bytes = view.host_bytes - self.snapshot.host_free_bytes
            others = self._least_worth(model, lacking_bytes)
            if others and sum(_saved(each.view) for each in others) <= view.reload_s * view.demand:
                reason = f"its host copy makes room for that of {view.id}"
                return Unload(others[0].view.id, reason)
        return Load(view.id)

    def _least_worth(self, model: _Model, lacking_bytes: int) -> list[_Model]:
        """Parked models whose host copies give that much; none if all do not suffice."""
        chosen = []
        for other in sorted(
            (
                other
                for other in self.models.values()
                if other is not model
                and other.view.state is ModelState.PARKED
                and other.view.host_bytes > 0
                and not other.view.pinned
                and other.view.id not in self.asked_for
            ),
            key=lambda other: _saved(other.view) / other.view.host_bytes,
        ):
            if lacking_bytes <= 0:
                break
            chosen.append(other)
            lacking_bytes -= other.view.host_bytes
        return chosen if lacking_bytes <= 0 else []

    def _expire(self) -> Transition | None:
        """Take out the first model that was asked to leave, or not asked for in its keep-alive."""
        now = self.snapshot.now
        for model in self._idle():
            view = model.view
            if view.id in self.asked_for:
                continue
            if view.park_reason is not None:
                return _whole(model).leave(view.park_reason)
            if view.idle_since is None:
                continue
            expires_at = view.idle_since + view.keep_alive_s
            if expires_at <= now:
                return _whole(model).leave(f"idle for {now - view.idle_since:.0f} s")
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
    granted = view.state in (*COMPLETE, ModelState.PARKED)
    return view.pinned and granted and view.unload_reason is None


def _saved(view: ModelView) -> float:
    """Seconds that its host copy is expected to save, per second."""
    return max(0.0, view.reload_s - view.wake_s) * view.demand


def _by_model(pieces: list[_Piece]) -> list[_Victim]:
    grouped: dict[_Model, list[_Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.model, []).append(piece)
    return [
        _Victim(
            model,
            _names(each),
            model.view.resident_bytes if _names(each) is None else sum(p.nbytes for p in each),
        )
        for model, each in grouped.items()
    ]


def _names(pieces: list[_Piece]) -> frozenset[str] | None:
    """The blocks to park; None where that would not do."""
    names = frozenset(piece.block for piece in pieces if piece.block is not None)
    return names if len(names) == len(pieces) else None


def _whole(model: _Model) -> _Victim:
    """All that the model has on the device."""
    return _Victim(model, _names(model.pieces()), model.view.resident_bytes)


def _first_idle(victims: Iterable[_Victim], reason: str) -> Unload | Park | None:
    for victim in victims:
        if victim.model.leases == 0:
            return victim.leave(reason)
    return None
