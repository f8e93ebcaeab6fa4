"""What the planner decides: grants, refusals and one transition."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from engine.status import Eviction


class RefusalCode(StrEnum):
    """Why a ticket is refused."""

    DEADLINE = "deadline"
    NEVER_FITS = "never_fits"
    NOT_LOADED = "not_loaded"
    HELD = "held"
    """Sessions keep models that leave no room for it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket that is not served."""

    ticket_id: int
    code: RefusalCode
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a model in: its parked blocks, or all of it from disk."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload an idle model."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Park:
    """Take blocks of an idle model off the device."""

    model: str
    blocks: frozenset[str]
    reason: str


Transition: TypeAlias = Load | Unload | Park


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: the grants and refusals first, then the transition."""

    grants: tuple[int, ...]
    refusals: tuple[Refusal, ...]
    transition: Transition | None
    draining: frozenset[str]
    """Models of which younger tickets are held back for the claim."""
    wake_at: float | None
    """The earliest time at which time alone could change the plan; None: never."""
    next_model: str | None = None
    """The model that is loaded as soon as there is room for it; None: there is none."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one more request would need, and which models would leave for it."""

    fits: bool
    wanted_bytes: int | None
    evictions: tuple[Eviction, ...]
    reason: str
