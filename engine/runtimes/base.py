"""The whole contract between the engine and a native library.

A runtime adapts one library and lives in one file. The engine calls `prepare`
and `estimate` before anything is loaded, `load`/`unload` one at a time, and
`LoadedModel.run` as often as leases allow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client.registry import CollectorRegistry

from engine.config import ModelConfig, Section
from engine.events import Event
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.memory.host_memory import HostMemory
from engine.requests import Request


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice that a speech model can be asked for."""

    id: str
    name: str
    language: str | None = None
    """ISO 639-1 with or without a region; None: any."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed every check that needs no loaded model.

    `request` has the model's defaults filled in, where the fields are the engine's own. `payload`
    is the runtime's parsed form. `working_bytes` is an estimate of the device memory the
    run needs on top of the model's blocks.
    """

    request: Request
    payload: Any
    working_bytes: int = 0
    shape: str = ""
    """What the working memory depends on. A run of that shape that gives `WorkingMemory` corrects
    the estimate of the next; runs without a shape are never corrected."""


class LoadedModel(ABC):
    """A model that is on the device and can run."""

    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Measured device bytes of each part."""

    @property
    @abstractmethod
    def max_concurrency(self) -> int:
        """How many leases may be held at once (1 or more)."""

    @property
    def host_bytes(self) -> int:
        """Host memory of the master copies that parked blocks come back from."""
        return 0

    @abstractmethod
    def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Run one request and yield its events.

        Closing the generator cancels the work and gives back what it held.

        Raises:
            InvalidRequest: the loaded model rejects the request (context too long, …).
            OutOfDeviceMemory: the device ran out of memory.
            RuntimeFailed: the library failed.

        """


class Runtime(ABC):
    """The adapter of one native library."""

    name: ClassVar[str]

    Options: ClassVar[type[Section]]
    """What `options` of a model of this runtime may hold."""

    metrics: CollectorRegistry | None = None
    """The library's own metric series, where it has any."""

    host: HostMemory | None = None
    """Where master copies go; None: there are none, and no model can be parked."""

    budget_bytes: int | None = None
    """What all models together may use of the device; None while nobody has said."""

    @abstractmethod
    def __init__(self, device: Device, cache_dir: Path) -> None:
        """Take note of where models go and where their files are kept; import nothing."""

    @abstractmethod
    def start(self) -> None:
        """Import the library and do what must happen once per process.

        Called off the event loop, before the heap is frozen; may take many seconds.
        """

    async def warm_up(self) -> None:  # noqa: B027 - most libraries need none
        """Do what the first load would else do for the whole process.

        Called once, after `start`. What it leaves behind counts as the process's own.
        """

    @abstractmethod
    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check a request before anything is loaded for it.

        Raises:
            InvalidRequest: naming the field at fault.

        """

    @abstractmethod
    def estimate(self, model: ModelConfig) -> Estimate:
        """Read what the model will take from its files' headers, without loading it.

        Called off the event loop.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:  # noqa: ARG002
        """The files that a load will read, as far as they are worth reading ahead.

        Raises:
            LoadFailed: they are missing.

        """
        return ()

    @abstractmethod
    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        """Bring the model onto the device.

        `on_failure(reason)` is called on the event loop if the model later
        dies by itself. On any error everything taken is given back first.

        Raises:
            LoadFailed: with the reason in words.

        """

    @abstractmethod
    async def unload(self, loaded: LoadedModel) -> None:
        """Take the model off the device and give every byte back. Never raises for a dead model."""

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Take parkable blocks off the device; the model stays loaded. Called while nothing runs.

        Copies nothing back: the host copy is the master.
        """
        raise NotImplementedError(f"{self.name} has no parkable blocks")

    async def wake(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Bring parked blocks back.

        Raises:
            OutOfDeviceMemory: there is no room for all of them; they are parked as before.
            LoadFailed: they could not be brought back; they are parked as before.

        """
        raise NotImplementedError(f"{self.name} has no parkable blocks")

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:  # noqa: ARG002 - few have any
        """The voices of a speech model, read from its files. Called off the event loop.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """
        return ()

    async def check_alive(self) -> None:  # noqa: B027 - most libraries have no thread of their own
        """Return once the library's own threads have answered."""

    async def stop(self) -> None:  # noqa: B027 - most libraries have nothing to stop
        """Give back what `start` took."""
