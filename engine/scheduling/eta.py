"""When waiting requests will be served, by measured service times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.scheduling.scheduled_model import ScheduledModel
from engine.scheduling.snapshot import TicketView
from engine.status import ModelState

SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 600.0


class EtaEstimator:
    """Gives the ETA of the waiting requests, one after the other, in the order of the queue.

    The ETA is turns of the model's measured service time, after what must be moved first. It
    leaves out the time in which other models leave, and for how long others stay in use.
    """

    def __init__(self, models: Mapping[str, ScheduledModel], now: float) -> None:
        self._models = models
        self._now = now
        self._before: Counter[str] = Counter()
        self._moves_s = 0.0
        """Seconds of moving the models of requests further ahead."""

    def next(self, view: TicketView) -> float | None:
        """Seconds until the next request in the queue is served; None while unknown."""
        if view.hold:
            return self._hold(view)
        model = self._models[view.model]
        turns = (model.leases + self._before[view.model]) // model.max_concurrency
        first = not self._before[view.model]
        self._before[view.model] += 1
        if model.move_s is None or (turns and model.service_s is None):
            return None
        return self._moved_s(model, model.move_s, first=first) + turns * (model.service_s or 0.0)

    def _moved_s(self, model: ScheduledModel, move_s: float, *, first: bool) -> float:
        """Seconds until a model is there, for the `first` request for it or a later one."""
        if model.state in (ModelState.LOADING, ModelState.WAKING):
            return max(0.0, move_s - (self._now - model.load_began_at))
        if model.state is ModelState.RESIDENT:
            return 0.0
        if first:
            self._moves_s += move_s
        return self._moves_s

    def _hold(self, view: TicketView) -> float | None:
        """Seconds until all models of a session are there. It waits for no turn."""
        longest_s = 0.0
        for name in view.models:
            model = self._models[name]
            first = not self._before[name]
            self._before[name] += 1
            if model.move_s is None:
                return None
            longest_s = max(longest_s, self._moved_s(model, model.move_s, first=first))
        return longest_s


def retry_after_s(model: ScheduledModel) -> float:
    """When one more request for the model would be served: what a refused client should wait."""
    turns = (model.waiting + model.leases) / model.max_concurrency
    wait_s = turns * (model.service_s or SHORTEST_RETRY_S)
    if model.state is not ModelState.RESIDENT:
        wait_s += model.move_s or 0.0
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, wait_s))
