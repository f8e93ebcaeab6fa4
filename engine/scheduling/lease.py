"""The right to run on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class LeaseTimings:
    """The parts of the wait for a lease, in seconds."""

    queued_s: float
    """From arrival to grant, loading included."""
    load_s: float
    """The part of it in which the model was being loaded or woken."""
    tier: str = "device"
    """Where the model was when the request came: `device`, `host` or `disk`."""


class Lease:
    """The right to run on a resident model, or to keep models resident.

    Give it back with `release`, or as a context.
    """

    __slots__ = (
        "_release",
        "adapters",
        "exclusive",
        "granted_at",
        "hold",
        "model_id",
        "models",
        "name",
        "on_release",
        "timings",
    )

    def __init__(
        self,
        model_id: str,
        name: str,
        *,
        exclusive: bool,
        granted_at: float,
        timings: LeaseTimings,
        release: Callable[[Lease], None],
        adapters: tuple[str, ...] = (),
        hold: bool = False,
        further_models: tuple[str, ...] = (),
    ) -> None:
        self.model_id = model_id
        self.models = (model_id, *further_models)
        self.name = name
        """Its name in the ledger: the request id and a serial number."""
        self.adapters = adapters
        self.exclusive = exclusive
        self.hold = hold
        """It keeps its models on the device, and takes a place on none."""
        self.granted_at = granted_at
        self.timings = timings
        self._release = release
        self.on_release: Callable[[], None] | None = None
        """Called once, when it is given back."""

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        self._release(self)
        on_release, self.on_release = self.on_release, None
        if on_release is not None:
            on_release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
