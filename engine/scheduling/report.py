"""What the scheduler reports of its models and of its queue. Reads only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from engine.requests import Priority
from engine.scheduling.eta import EtaEstimator
from engine.scheduling.planner import forecast, service_order
from engine.scheduling.scheduled_model import ScheduledModel
from engine.scheduling.snapshot import Snapshot, TicketView
from engine.scheduling.ticket import Ticket
from engine.scheduling.ticket_queue import TicketQueue
from engine.status import Forecast, ModelState, ModelStatus, TicketStatus

TIERS = ("device", "host", "disk")
"""From the nearest."""

MAX_STATUS_AGE_S = 0.5
"""How old the status may be that a waiting request gets."""


class SchedulerReport:
    """Status of models, of tickets, and of a request that has not come yet."""

    def __init__(
        self,
        models: Mapping[str, ScheduledModel],
        queue: TicketQueue,
        snapshot: Callable[[], Snapshot],
        clock: Callable[[], float],
        *,
        max_overtake_s: float,
        created: int,
    ) -> None:
        """Keep references to the scheduler's own state; `snapshot` gives it to the planner."""
        self._models = models
        self._queue = queue
        self._snapshot = snapshot
        self._clock = clock
        self._max_overtake_s = max_overtake_s
        self._created = created
        self._statuses: dict[int, TicketStatus] = {}
        """By serial number, as they were at `_statuses_at`."""
        self._statuses_at = -math.inf

    def model(self, model_id: str) -> ModelStatus:
        """One configured model, as it is now."""
        return self._models[model_id].status(self._clock(), self._created)

    def models(self) -> tuple[ModelStatus, ...]:
        """Every configured model, as it is now."""
        now = self._clock()
        return tuple(model.status(now, self._created) for model in self._models.values())

    def wanted(self) -> tuple[str, ...]:
        """The models that are there or being brought in, by demand, highest first."""
        now = self._clock()
        there = (ModelState.LOADING, ModelState.WAKING, ModelState.RESIDENT, ModelState.PARKED)
        models = [model for model in self._models.values() if model.state in there]
        models.sort(key=lambda model: model.demand.read(now), reverse=True)
        return tuple(model.config.id for model in models)

    def queue(self) -> tuple[TicketStatus, ...]:
        """Every waiting request, in the order in which the planner considers them."""
        return tuple(self._queue_statuses().values())

    def ticket_status(self, ticket: Ticket) -> TicketStatus | None:
        """Where a request stands, up to `MAX_STATUS_AGE_S` ago; None once it waits no more.

        Cheap enough for every waiting request to ask once a second.
        """
        serial = self._queue.serial(ticket)
        if serial is None:
            return None
        now = self._clock()
        if serial not in self._statuses or now > self._statuses_at + MAX_STATUS_AGE_S:
            self._statuses, self._statuses_at = self._queue_statuses(), now
        return self._statuses[serial]

    def forecast(
        self,
        model_id: str,
        *,
        further_models: tuple[str, ...] = (),
        working_bytes: int = 0,
        priority: Priority = Priority.NORMAL,
    ) -> Forecast:
        """What would be done for one more request, if it came now. Changes nothing.

        With `further_models` it is for a session that keeps all of these models.
        """
        snapshot = self._snapshot()
        now = snapshot.now
        models = [self._models[name] for name in (model_id, *further_models)]
        moves_s = [model.move_s for model in models]
        ticket = TicketView(
            id=self._queue.next_serial,
            model=model_id,
            working_bytes=working_bytes,
            priority=priority,
            enqueued_at=now,
            deadline=math.inf,
            hold=bool(further_models),
            further_models=further_models,
        )
        outlook = forecast(snapshot, ticket)
        eta = EtaEstimator(self._models, now)
        for view in service_order((*snapshot.tickets, ticket), now, snapshot.max_overtake_s):
            eta_s = eta.next(view)
            if view is ticket:
                break
        return Forecast(
            model=model_id,
            further_models=further_models,
            fits=outlook.fits,
            tier=max((model.tier for model in models), key=TIERS.index),
            wanted_bytes=outlook.wanted_bytes,
            free_bytes=snapshot.free_bytes,
            evictions=outlook.evictions,
            move_s=None if None in moves_s else sum(each or 0.0 for each in moves_s),
            eta_s=eta_s if outlook.fits else None,
            service_s=models[0].service_s,
            reason=outlook.reason,
        )

    def _queue_statuses(self) -> dict[int, TicketStatus]:
        """Every waiting request by its serial number, in order."""
        now = self._clock()
        eta = EtaEstimator(self._models, now)
        order = service_order(self._queue.views(), now, self._max_overtake_s)
        statuses = {}
        for position, view in enumerate(order, start=1):
            ticket = self._queue.ticket(view.id)
            statuses[view.id] = TicketStatus(
                request_id=ticket.request_id,
                model=view.model,
                operation=ticket.operation,
                priority=ticket.priority.name.lower(),
                position=position,
                waited_s=now - view.enqueued_at,
                eta_s=eta.next(view),
            )
        return statuses
