"""Where a request stands on its way to a session."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.scheduling.ticket import Ticket


class Stage(StrEnum):
    """What a request waits for."""

    STARTING = "starting"
    """The engine, which still starts."""
    FETCHING = "fetching"
    """The model's files."""
    QUEUED = "queued"
    LOADING = "loading"
    WAKING = "waking"
    RUNNING = "running"
    """Granted: the model works on its first event."""


class Waiting:
    """One request's way to its session. `Engine.open` writes it; `Engine.wait_status` reads it."""

    def __init__(self) -> None:
        self.stage = Stage.STARTING
        self.ticket: Ticket | None = None
        """While the scheduler has it."""


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """What can be told of a wait at one moment."""

    stage: Stage
    position: int | None = None
    """Among all waiting requests; 1 is next. None where it is not in the queue."""
    eta_s: float | None = None
    """Seconds until it is granted, as far as can be told."""
