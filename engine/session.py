"""A running request: it holds the lease and gives the events, the first of which is here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from engine.caller import NOBODY, Caller
from engine.config import ModelConfig
from engine.costs.accounts import Charge, Reservation
from engine.errors import EngineError
from engine.events import Cut, Event, Progress
from engine.run import Run
from engine.scheduling.lease import Lease
from engine.tracing import Granted, RequestTrace
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


@dataclass(frozen=True, slots=True)
class Attempt:
    """A model that could not serve the request, before the one that does."""

    model: str
    code: str
    """Of its error."""


Retry: TypeAlias = Callable[[EngineError], Awaitable["Session"]]
"""Runs the request once more after this error, or raises one."""


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
        self.attempts: tuple[Attempt, ...] = ()
        self.caller: Caller = NOBODY
        """Gets the usage once, when the session is closed."""
        self._counted = False
        self.on_closed: Callable[[str], None] | None = None
        """Called once with the id of the model, when the session is closed."""
        self.again: Retry | None = None
        """How to go on after the run has failed and given no more than progress."""
        self.reservation: Reservation | None = None
        """Settled when the run has ended."""
        self.charge: Charge | None = None
        """What the run cost, once it has ended."""
        self._error: BaseException | None = None
        """Why the run failed."""
        self._trace: RequestTrace | None = None
        self._run = Run(rest, lease)

    def trace_by(self, trace: RequestTrace) -> None:
        """Tell a trace how the request came here, and from now on what it gives."""
        self._trace = trace
        trace.opened(
            Granted(
                self.model.id,
                self.timings.tier,
                self.timings.fetch_ms / 1e3,
                self.timings.queue_ms / 1e3,
                self.timings.load_ms / 1e3,
                self.timings.run_ms / 1e3,
                tuple((each.model, each.code) for each in self.attempts),
            ),
            self.first,
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """The whole run, `first` included. Closing it cancels the work.

        A run that fails and gave no more than progress may be tried once more: see `again`.

        Raises:
            EngineError: the run failed part-way.

        """
        given = False
        try:
            event = self.first
            while True:
                given = given or not isinstance(event, Progress)
                self._run.give()
                if self._trace is not None:
                    self._trace.gave(event)
                yield event
                try:
                    following = await self._run.next()
                except EngineError as error:
                    if given or self.again is None:
                        raise
                    await self._run.close()
                    self._take(await self.again(error))
                    following = self.first
                if following is None:
                    return
                event = following
        except Exception as error:
            self._error = error
            raise
        finally:
            await self.close()

    def _take(self, other: Session) -> None:
        """Become the session that goes on with the request."""
        if other.reservation is not None:  # of another model: what this one took is its own
            if self.reservation is not None:
                self.reservation.settle(self.usage, self.usage.device_s, served=False)
            self.reservation, self.charge = other.reservation, other.charge
        self.model, self.first, self.timings = other.model, other.first, other.timings
        self.notes, self.usage, self.attempts = other.notes, other.usage, other.attempts
        self.again, self._run = other.again, other._run

    async def close(self) -> None:
        """Stop what still runs, end the lease, and count what it took."""
        try:
            await self._run.close()
        finally:
            if not self._counted:
                self._counted = True
                self.caller.count(self.usage)
                if self.on_closed is not None:
                    self.on_closed(self.model.id)
            self.settle()
            if self._trace is not None:
                trace, self._trace = self._trace, None
                trace.ended(self.model.id, self.usage, self._error)

    def settle(self) -> None:
        """Settle what the run cost. It has ended; a second call changes nothing."""
        if self.reservation is not None:
            self.charge = self.reservation.settle(
                self.usage, self.usage.device_s, served=self._error is None
            )
