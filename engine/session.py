"""A running request: it holds the lease and gives the events, the first of which is here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from engine.config import ModelConfig
from engine.costs.accounts import Charge, Reservation
from engine.errors import OutOfDeviceMemory
from engine.events import Cut, Event, Progress
from engine.run import Run
from engine.scheduling.lease import Lease
from engine.usage import Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in milliseconds."""

    queue_ms: float
    load_ms: float
    run_ms: float
    """To the first event of a stream; the whole run of a document."""
    tier: str
    """Where the model was when the request came: `device`, `host` or `disk`."""
    fetch_ms: float = 0.0
    """Before the queue: until the files of the model were here, fetched or built, and read."""


@dataclass(slots=True)
class Notes:
    """What a run reports beside its results."""

    peak_bytes: int | None = None
    """Peak device bytes above the model's blocks; None until they are measured."""
    cuts: list[Cut] = field(default_factory=list)
    """Texts of the request that were too long. They are known before the first event."""


class Session:
    """A request that runs: its first event is here already, so it has not failed so far."""

    def __init__(
        self,
        model: ModelConfig,
        first: Event,
        rest: AsyncGenerator[Event, None],
        lease: Lease,
        timings: Timings,
        notes: Notes,
        usage: Usage,
    ) -> None:
        self.model = model
        self.first = first
        self.timings = timings
        self.notes = notes
        self.usage = usage
        self.again: Callable[[], Awaitable[Session]] | None = None
        """How to run the request once more after it ran out of device memory."""
        self.reservation: Reservation | None = None
        """Settled when the run has ended."""
        self.charge: Charge | None = None
        """What the run cost, once it has ended."""
        self._failed = False
        self._run = Run(rest, lease)

    async def events(self) -> AsyncGenerator[Event, None]:
        """The whole run, `first` included. Closing it cancels the work.

        A run that gave no more than progress before it ran out of device memory is tried once
        more, alone.

        Raises:
            EngineError: the run failed part-way.

        """
        given = False
        try:
            event = self.first
            while True:
                given = given or not isinstance(event, Progress)
                self._run.give()
                yield event
                try:
                    following = await self._run.next()
                except OutOfDeviceMemory as error:
                    if given or self.again is None:
                        raise
                    log.warning("%s; trying once more, alone", error)
                    await self._run.close()
                    second, self.again = await self.again(), None
                    self._run, self.notes = second._run, second.notes
                    self.usage = second.usage
                    following = second.first
                if following is None:
                    return
                event = following
        except Exception:
            self._failed = True
            raise
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop what still runs, end the lease, and settle what it cost."""
        try:
            await self._run.close()
        finally:
            self.settle()

    def settle(self) -> None:
        """Count what the run took. It has ended; a second call changes nothing."""
        if self.reservation is not None:
            self.charge = self.reservation.settle(
                self.usage, self.usage.device_s, served=not self._failed
            )
