"""What the planner decides from."""

from __future__ import annotations

from dataclasses import dataclass

from engine.status import ModelState


@dataclass(frozen=True, slots=True)
class PartView:
    """A block on the device that can leave it while its model stays loaded."""

    name: str
    nbytes: int
    wake_s: float
    """What bringing it back takes."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One configured model, as the decision sees it."""

    id: str
    state: ModelState
    resident_bytes: int
    """Granted for its blocks on the device, and for what is being brought in."""
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
    """From disk."""
    demand: float
    """Expected requests per second."""
    unload_reason: str | None = None
    """Why the model must leave as soon as it is idle, pinned or not; None while it may stay."""
    park_reason: str | None = None
    """Why it was asked to leave the device when it is idle; None while it was not."""
    parts: tuple[PartView, ...] = ()
    """Its blocks on the device that can be parked."""
    leaving_bytes: int = 0
    """Of the blocks that are being parked."""
    wake_s: float = 0.0
    """What bringing back everything that can be parked would take."""
    host_bytes: int = 0
    """Of its host copy; what a load would make of it, while absent."""


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
    no_evict: bool = False
    """No other model may leave for it."""
    if_loaded_only: bool = False
    """It is refused rather than waiting for its model to be brought in."""


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
    """A model is being moved."""
    exclusive_running: bool = False
    draining: frozenset[str] = frozenset()
    """`Plan.draining` of the plan before."""
    host_free_bytes: int = 0
    """For host copies."""
