"""What the engine tells about itself: frozen snapshots, safe to render anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class ModelState(StrEnum):
    """Where a model is in its life."""

    ABSENT = "absent"
    """On disk only."""
    LOADING = "loading"
    RESIDENT = "resident"
    """All of it is on the device."""
    PARKING = "parking"
    PARKED = "parked"
    """Loaded, but some or all of its blocks have left the device."""
    WAKING = "waking"
    UNLOADING = "unloading"


COMPLETE = (ModelState.LOADING, ModelState.WAKING, ModelState.RESIDENT)
"""States in which everything that the model needs is granted."""


class EngineState(StrEnum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """One part of a model and where its bytes are."""

    name: str
    nbytes: int
    tier: str


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One configured model."""

    id: str
    aliases: tuple[str, ...]
    runtime: str
    task: str
    source: str
    state: ModelState
    tier: str
    """`device` while all of it is there, `host` while some of it is parked, else `disk`."""
    blocks: tuple[BlockStatus, ...]
    device_bytes: int
    host_bytes: int
    """Of the host copy."""
    estimated_bytes: int | None
    """What a load is expected to take; None while the files have not been read."""
    estimated_load_s: float | None
    """From disk."""
    estimated_wake_s: float | None
    """Of what is parked now; None while nothing is."""
    leases: int
    waiting: int
    pinned: bool
    keep_alive_s: float
    idle_s: float | None
    """Seconds since the last lease ended; None while absent or in use."""
    last_error: str | None
    created: int
    """Unix seconds at which the model was configured (OpenAI's `created`)."""


@dataclass(frozen=True, slots=True)
class TicketStatus:
    """One waiting request."""

    request_id: str
    model: str
    operation: str
    priority: str
    position: int
    """1 is next."""
    waited_s: float
    eta_s: float | None
    """Seconds until it is expected to be served; None while nothing tells."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """What would leave the device."""

    model: str
    blocks: tuple[str, ...]
    """Those that would be parked; none: the model would be unloaded."""
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would be done for one more request, if it came now."""

    model: str
    fits: bool
    """Whether it could ever be served."""
    tier: str
    """Where the model is: `device`, `host` or `disk`."""
    wanted_bytes: int | None
    """To bring onto the device, working memory included; None while the files were not read."""
    free_bytes: int
    evictions: tuple[Eviction, ...]
    move_s: float | None
    """Loading or waking; 0 while it is there, None while nothing tells."""
    eta_s: float | None
    """Until it would be served, everything that is ahead of it included."""
    reason: str
    """In words."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Bytes granted to one owner under one name."""

    owner: str
    kind: str
    """`block` (a resident part), `reservation` (a load under way) or `lease` (working memory)."""
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class LedgerStatus:
    """Every byte. `granted = sum(entries)` and `free = capacity - granted` always hold."""

    total_bytes: int
    budget_bytes: int
    external_bytes: int
    """Measured use that no entry accounts for: other programs and this process's own overhead."""
    capacity_bytes: int
    granted_bytes: int
    free_bytes: int
    peak_granted_bytes: int
    entries: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The memory of the host copies."""

    budget_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often this process had to be started again since the command was."""

    count: int = 0
    reason: str | None = None
    """Why the last time, in words."""
    at: float | None = None
    """Unix seconds of the last time."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The whole engine at one moment."""

    state: EngineState
    device_kind: str
    device_name: str
    ledger: LedgerStatus
    host: HostStatus
    models: tuple[ModelStatus, ...]
    queue: tuple[TicketStatus, ...]
    transition: str | None
    """What is being moved, in words."""
    restarts: Restarts = field(default_factory=Restarts)
