"""A world for the scheduler to act in: a clock that tests move, and recorded effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError
from engine.memory.block import Block, Estimate
from engine.requests import Priority
from engine.scheduling.lease import Lease
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.ticket import Ticket


@dataclass
class Clock:
    """Monotonic seconds that move only when told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class RecordedEffects:
    """Keeps what the scheduler asked for; the test answers with the events."""

    external_bytes: int = 0
    host_bytes: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    wake_at: float | None = None

    def estimate(self, model_id: str) -> None:
        self.calls.append(("estimate", model_id))

    def prefetch(self, model_id: str) -> None:
        self.calls.append(("prefetch", model_id))

    def load(self, model_id: str) -> None:
        self.calls.append(("load", model_id))

    def unload(self, model_id: str, reason: str) -> None:
        self.calls.append(("unload", model_id))

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:
        self.calls.append(("park", f"{model_id}:{'+'.join(sorted(blocks))}"))

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:
        self.calls.append(("wake", f"{model_id}:{'+'.join(sorted(blocks))}"))

    def measure_external(self) -> int:
        return self.external_bytes

    def host_free_bytes(self) -> int:
        return self.host_bytes

    def call_at(self, when: float) -> None:
        self.wake_at = when


@dataclass
class Client:
    """One request, and what became of it."""

    ticket: Ticket = field(init=False)
    lease: Lease | None = None
    error: EngineError | None = None

    def granted(self, lease: Lease) -> None:
        assert self.lease is None and self.error is None, "answered twice"
        self.lease = lease

    def refused(self, error: EngineError) -> None:
        assert self.lease is None and self.error is None, "answered twice"
        self.error = error

    @property
    def waits(self) -> bool:
        return self.lease is None and self.error is None

    def release(self) -> None:
        assert self.lease is not None, "was not granted"
        self.lease.release()


def client(
    model_id: str,
    *,
    working_bytes: int = 0,
    priority: Priority = Priority.NORMAL,
    timeout_s: float = 1000.0,
    exclusive: bool = False,
    no_evict: bool = False,
    if_loaded_only: bool = False,
    keep_alive_s: float | None = None,
    request_id: str = "request",
    keeps: tuple[str, ...] | None = None,
) -> Client:
    """A client whose ticket is not queued yet; `keeps` makes it a session's."""
    new = Client()
    new.ticket = Ticket(
        request_id=request_id,
        model_id=model_id,
        operation="chat",
        working_bytes=working_bytes,
        priority=priority,
        timeout_s=timeout_s,
        exclusive=exclusive,
        no_evict=no_evict,
        if_loaded_only=if_loaded_only,
        keep_alive_s=keep_alive_s,
        hold=keeps is not None,
        further_models=keeps or (),
        on_granted=new.granted,
        on_refused=new.refused,
    )
    return new


def ask(scheduler: Scheduler, model_id: str, **options: Any) -> Client:
    """A client whose ticket is queued."""
    new = client(model_id, **options)
    scheduler.on_request(new.ticket)
    return new


def estimate(nbytes: int, load_seconds: float = 1.0) -> Estimate:
    """An estimate of one block."""
    return Estimate((Block("weights", nbytes),), load_seconds)


def config(models: Sequence[str | ModelConfig], **limits: Any) -> EngineConfig:
    """A configuration that needs no runtime: what a runtime would validate is left out."""
    return EngineConfig.model_construct(
        models=tuple(
            ModelConfig.model_construct(id=model, source="folder")
            if isinstance(model, str)
            else model
            for model in models
        ),
        **limits,
    )
