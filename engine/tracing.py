"""What a tracer is told of a request on its way. The engine knows no library for traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.events import Event
from engine.requests import Request
from engine.usage import Usage


@dataclass(frozen=True, slots=True)
class Granted:
    """How a request came to its model, and how long that took."""

    model: str
    tier: str
    """Where the model was when the request came: `device`, `host` or `disk`."""
    fetch_s: float
    queue_s: float
    """Without the load."""
    load_s: float
    first_event_s: float
    """From the grant to the first event."""
    tried: Sequence[tuple[str, str]] = ()
    """Models that could not serve it, and the codes of their errors."""


class RequestTrace(Protocol):
    """The trace of one request. `failed` or `ended` is called last, and once."""

    def failed(self, error: BaseException) -> None:
        """It did not come to its first event."""

    def opened(self, granted: Granted, first: Event) -> None:
        """Its first event is here."""

    def gave(self, event: Event) -> None:
        """Its caller gets an event; the first one may be told twice."""

    def ended(self, model: str, usage: Usage, error: BaseException | None) -> None:
        """Its run has ended, at the last on this model."""


class AttemptTrace(Protocol):
    """The trace of one request to a provider. `ended` is called last, and once."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What the provider is sent, so that its own spans join the trace."""

    def answered(self, status: int) -> None:
        """The head of its answer is here."""

    def ended(self, error: BaseException | None) -> None:
        """Its answer is read, or given up."""


class Tracer(Protocol):
    """Makes spans. Every method returns at once and raises nothing."""

    def request(self, request: Request) -> RequestTrace:
        """A request comes to the engine."""

    def submitted(self, job_id: str) -> None:
        """The current request has a job made, whose own requests have this id."""

    def moved(self, kind: str, model: str) -> None:
        """An event of the scheduler: see `EventKind`."""

    def attempt(self, provider: str, model: str, number: int) -> AttemptTrace:
        """A request is sent to a provider, for the `number`th time; 0 is the first."""
