"""What the planner decides."""

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


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket that is not served."""

    ticket_id: int
    code: RefusalCode
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a model in: what is parked of it, or all of it from disk."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Take an idle model out."""

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
    """Models whose younger tickets are held back for the claim."""
    wake_at: float | None
    """The earliest time at which time alone could change the decision."""
    next_model: str | None = None
    """Whose files will be read as soon as there is room; None while nothing is to come."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What bringing in a model for one more request would take."""

    fits: bool
    wanted_bytes: int | None
    evictions: tuple[Eviction, ...]
    reason: str
