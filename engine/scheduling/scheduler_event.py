"""Events of the scheduler, for the log and the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """The kinds of events."""

    GRANT = "grant"
    REFUSE = "refuse"
    LOAD = "load"
    LOADED = "loaded"
    LOAD_FAILED = "load_failed"
    WAKE = "wake"
    WOKEN = "woken"
    WAKE_FAILED = "wake_failed"
    PARK = "park"
    PARKED = "parked"
    UNLOAD = "unload"
    UNLOADED = "unloaded"
    MODEL_FAILED = "model_failed"
    BUDGET = "budget"
    """80, 90 or 100 percent of a budget are spent. It concerns no model."""


@dataclass(frozen=True, slots=True)
class SchedulerEvent:
    """One event, with the ledger's bytes at that moment."""

    kind: EventKind
    model: str
    reason: str
    granted_bytes: int
    capacity_bytes: int
    request_id: str | None = None
    """Of a grant or refusal."""
