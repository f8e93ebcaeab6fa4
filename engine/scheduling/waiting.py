"""Where a request stands on its way to a session."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine.scheduling.ticket import Ticket
from engine.usage import Usage


class Stage(StrEnum):
    """What a request waits for."""

    STARTING = "starting"
    """The start of the engine."""
    FETCHING = "fetching"
    """The model's files."""
    QUEUED = "queued"
    LOADING = "loading"
    WAKING = "waking"
    RUNNING = "running"
    """The model's first event; the lease is granted."""


class Waiting:
    """The way of one request: `Engine.open` writes it, `Engine.wait_status` reads it."""

    def __init__(self) -> None:
        self.stage = Stage.STARTING
        self.model = ""
        """The id of the model that the request waits for; empty before one is chosen."""
        self.ticket: Ticket | None = None
        """Set while the request is in the scheduler's queue."""
        self.usage: Usage | None = None
        """What the run has taken so far; None before the request was checked."""


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """The state of a wait at one moment."""

    stage: Stage
    position: int | None = None
    """Among all waiting requests; 1 is next. None outside the queue."""
    eta_s: float | None = None
    """Seconds until the grant; None while unknown."""
