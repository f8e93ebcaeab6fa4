"""The input of the planner: a snapshot of models and tickets."""

from __future__ import annotations

from dataclasses import dataclass

from engine.status import ModelState


@dataclass(frozen=True, slots=True)
class PartView:
    """A block on the device that can leave it while its model stays loaded."""

    name: str
    nbytes: int
    wake_s: float
    """Seconds of bringing it back."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One configured model, as the planner sees it."""

    id: str
    state: ModelState
    resident_bytes: int
    """Granted for the blocks on the device and for those being brought in."""
    needed_bytes: int | None
    """Of a load, as estimated or last measured; None while unknown."""
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
    """Why the model must be parked as soon as it is idle; None while it may stay."""
    parts: tuple[PartView, ...] = ()
    """The blocks on the device that can be parked."""
    leaving_bytes: int = 0
    """Of the blocks that are being parked."""
    wake_s: float = 0.0
    """What bringing back everything that can be parked would take."""
    host_bytes: int = 0
    """Of the host copy; while the model is absent, of the copy that a load would make."""
    holds: int = 0
    """Sessions for which it must stay on the device."""
    used_at: float = 0.0
    """When a request that is not of a batch last asked for it."""


@dataclass(frozen=True, slots=True)
class TicketView:
    """One waiting ticket, as the planner sees it."""

    id: int
    model: str
    working_bytes: int
    priority: int
    """Lower is served first."""
    enqueued_at: float
    deadline: float
    """When the ticket is refused; `math.inf` for never."""
    waited_s: float = 0.0
    """Before it was enqueued."""
    exclusive: bool = False
    no_evict: bool = False
    """No other model may leave for it."""
    if_loaded_only: bool = False
    """Refuse it rather than bring its model in."""
    hold: bool = False
    """It takes no place, and its models stay until it ends."""
    further_models: tuple[str, ...] = ()
    """Of a hold, beside `model`."""

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that it waits for."""
        return (self.model, *self.further_models)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a plan depends on. Times are seconds on one monotonic clock."""

    now: float
    budget_bytes: int
    capacity_bytes: int
    free_bytes: int
    """Capacity less granted; negative when other programs took what was granted."""
    max_overtake_s: float
    models: tuple[ModelView, ...]
    tickets: tuple[TicketView, ...]
    """In order of arrival."""
    busy: bool = False
    """A model is being moved."""
    exclusive_running: bool = False
    draining: frozenset[str] = frozenset()
    """`Plan.draining` of the last plan."""
    host_free_bytes: int = 0
    """Host memory left for host copies."""
