"""Where a queued job stands, and when it is expected to be completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.jobs.store import Job


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a queued job stands."""

    position: int
    """Queued jobs ahead of it; 0 is the next."""
    eta_s: float | None
    """Seconds until it is expected to be completed; None while a model's duration is unknown."""


def queue_place(
    job: Job,
    queued: Sequence[Job],
    running: Sequence[Job],
    mean_run_s: Callable[[str], float | None],
) -> QueuePlace:
    """The place of a job among all that are queued (by age) and those that run.

    The ETA takes the mean duration of each model's last jobs, `mean_run_s(model)`, one job after
    the other: they share one device.
    """
    by_priority = sorted(queued, key=lambda each: each.priority)
    position = by_priority.index(job)
    ahead = [*running, *by_priority[: position + 1]]
    mean_s = {model: mean_run_s(model) for model in {each.model for each in ahead}}
    eta_s = 0.0
    for each in ahead:
        duration_s = mean_s[each.model]
        if duration_s is None:
            return QueuePlace(position, None)
        eta_s += duration_s * (1 - each.progress)
    return QueuePlace(position, eta_s)
