"""What the engine tells about itself: frozen snapshots, safe to render anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ModelState(StrEnum):
    """Where a model is in its life."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"


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
    """`device` while any block is there, else `disk`."""
    blocks: tuple[BlockStatus, ...]
    device_bytes: int
    estimated_bytes: int | None
    """What a load is expected to take; None while the files have not been read."""
    estimated_load_s: float | None
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
    foreign_bytes: int
    """Measured use that no entry accounts for: other programs and this process's own overhead."""
    capacity_bytes: int
    granted_bytes: int
    free_bytes: int
    peak_granted_bytes: int
    entries: tuple[LedgerEntry, ...]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The whole engine at one moment."""

    state: EngineState
    device_kind: str
    device_name: str
    ledger: LedgerStatus
    models: tuple[ModelStatus, ...]
    queue: tuple[TicketStatus, ...]
    transition: str | None
    """The load or unload under way, in words."""
