"""The tickets that wait for a lease."""

from __future__ import annotations

from engine.scheduling.snapshot import TicketView
from engine.scheduling.ticket import Ticket


class TicketQueue:
    """The waiting tickets in order of arrival, each under a serial number of its own."""

    def __init__(self) -> None:
        self.next_serial = 0
        """Of the ticket that comes next."""
        self._tickets: dict[int, Ticket] = {}
        self._views: dict[int, TicketView] = {}
        self._serials: dict[Ticket, int] = {}
        self._tiers: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, serial: int) -> bool:
        return serial in self._tickets

    def add(self, ticket: Ticket, now: float, tier: str) -> int:
        """Let a ticket wait, and return its serial number; `tier` is where its model is now."""
        serial = self.next_serial
        self.next_serial += 1
        self._tickets[serial] = ticket
        self._serials[ticket] = serial
        self._views[serial] = TicketView(
            id=serial,
            model=ticket.model_id,
            working_bytes=ticket.working_bytes,
            priority=ticket.priority,
            enqueued_at=now,
            deadline=now + ticket.timeout_s,
            waited_s=ticket.waited_s,
            exclusive=ticket.exclusive,
            no_evict=ticket.no_evict,
            if_loaded_only=ticket.if_loaded_only,
            hold=ticket.hold,
            further_models=ticket.further_models,
        )
        self._tiers[serial] = tier
        return serial

    def remove(self, serial: int) -> Ticket:
        """Take a ticket out."""
        ticket = self._tickets.pop(serial)
        del self._views[serial]
        del self._tiers[serial]
        del self._serials[ticket]
        return ticket

    def serial(self, ticket: Ticket) -> int | None:
        """The serial number of a ticket; None if it does not wait."""
        return self._serials.get(ticket)

    def ticket(self, serial: int) -> Ticket:
        """The ticket of a serial number."""
        return self._tickets[serial]

    def tickets(self) -> tuple[Ticket, ...]:
        """Every ticket."""
        return tuple(self._tickets.values())

    def view(self, serial: int) -> TicketView:
        """The ticket of a serial number, as the planner sees it."""
        return self._views[serial]

    def views(self) -> tuple[TicketView, ...]:
        """Every ticket, as the planner sees it."""
        return tuple(self._views.values())

    def tier(self, serial: int) -> str:
        """Where the ticket's model was when the ticket came."""
        return self._tiers[serial]
