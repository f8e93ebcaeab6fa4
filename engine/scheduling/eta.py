"""When those who wait will be served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.scheduling.scheduled_model import ScheduledModel
from engine.scheduling.snapshot import TicketView
from engine.status import ModelState


class EtaEstimator:
    """Tells the waiting requests, one after the other, when they will be served.

    An estimate: turns of the model's measured service time, after what must be moved first. That
    models leave, and for how long others stay in use, is not in it.
    """

    def __init__(self, models: Mapping[str, ScheduledModel], now: float) -> None:
        self._models = models
        self._now = now
        self._before: Counter[str] = Counter()
        self._moves_s = 0.0
        """Of the models that are brought in for requests further ahead."""

    def next(self, view: TicketView) -> float | None:
        """Seconds until the next request in line is served; None while nothing tells."""
        model = self._models[view.model]
        turns = (model.leases + self._before[view.model]) // model.max_concurrency
        first = not self._before[view.model]
        self._before[view.model] += 1
        move_s = model.move_s
        if move_s is None or (turns and model.service_s is None):
            return None
        if model.state in (ModelState.LOADING, ModelState.WAKING):
            moved_s = max(0.0, move_s - (self._now - model.load_began_at))
        elif model.state is ModelState.RESIDENT:
            moved_s = 0.0
        else:
            if first:
                self._moves_s += move_s
            moved_s = self._moves_s
        return moved_s + turns * (model.service_s or 0.0)
