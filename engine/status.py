"""The status of the engine: frozen snapshots, safe to render anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ModelState(StrEnum):
    """The states of a model."""

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

MOVING = (ModelState.LOADING, ModelState.WAKING, ModelState.PARKING, ModelState.UNLOADING)
"""States in which a transition is under way."""


class EngineState(StrEnum):
    """The states of the engine."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """One block of a model, and the tier of its bytes."""

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
    """`device` while all of it is there, `host` while some of it is parked, otherwise `disk`."""
    blocks: tuple[BlockStatus, ...]
    device_bytes: int
    host_bytes: int
    """Bytes of the host copy."""
    estimated_bytes: int | None
    """Expected bytes of a load; None while the files have not been read."""
    estimated_load_s: float | None
    """From disk."""
    estimated_wake_s: float | None
    """Of the blocks that are parked now; None while none is."""
    leases: int
    holds: int
    """Sessions that keep it on the device."""
    waiting: int
    pinned: bool
    keep_alive_s: float
    idle_s: float | None
    """Seconds since the last lease ended; None while absent or in use."""
    last_error: str | None
    outdated: bool
    """A pull has brought newer files since its load. It takes them once it has been unloaded."""
    random_weights: bool
    """Its weights are random: its answers mean nothing."""
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
    """Seconds until it is expected to be served; None while unknown."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """A model, or blocks of one, that would leave the device."""

    model: str
    blocks: tuple[str, ...]
    """Blocks that would be parked; empty: the model would be unloaded."""
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would be done for one more request, or session, if it came now."""

    model: str
    fits: bool
    """Whether the request can ever be served."""
    tier: str
    """Where the model is: `device`, `host` or `disk`; of several, the furthest."""
    wanted_bytes: int | None
    """To bring onto the device, with the working memory; None while the files are not read."""
    free_bytes: int
    evictions: tuple[Eviction, ...]
    move_s: float | None
    """Seconds of the load or wake; 0 while the model is there, None while unknown."""
    eta_s: float | None
    """Seconds until it would be served, with everything ahead of it."""
    service_s: float | None
    """Seconds of a usual run of the model; None while it has served nothing."""
    reason: str
    """In words."""
    further_models: tuple[str, ...] = ()
    """Of a session, beside `model`."""


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
    """Measured bytes in use without an entry: other programs, and this process's overhead."""
    capacity_bytes: int
    granted_bytes: int
    free_bytes: int
    peak_granted_bytes: int
    entries: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The host memory for host copies."""

    budget_bytes: int
    used_bytes: int
    """With the prefixes."""
    prefix_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of the prefix caches that wait here for their KV cache, by model. They go first."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """The restarts of this process since the start of the command."""

    count: int = 0
    reason: str | None = None
    """Why it was restarted last, in words."""
    at: float | None = None
    """Unix seconds of the last restart."""


@dataclass(frozen=True, slots=True)
class ProviderModelStatus:
    """One remote model at its provider: what is left of its limits, None where nobody has said."""

    model: str
    requests_left: int | None
    tokens_left: int | None
    blocked_s: float
    """Seconds until the provider takes requests for it again."""


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """The provider of remote models."""

    provider: str
    breaker: str
    """`closed`, `open` (no request is sent) or `half_open` (one is sent as a probe)."""
    retry_after_s: float
    """Seconds until a request may be sent; 0: now."""
    error_rate: float | None
    """The share of failures in the last minute; None without requests."""
    first_byte_p50_s: float | None
    first_byte_p95_s: float | None
    """Seconds to the first byte of a stream, and to the end of a whole answer."""
    last_error: str | None
    last_error_at: float | None
    """Unix seconds."""
    models: tuple[ProviderModelStatus, ...]


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
    """The transition under way, in words."""
    restarts: Restarts = field(default_factory=Restarts)
