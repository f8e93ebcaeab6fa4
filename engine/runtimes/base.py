"""The whole contract between the engine and a native library.

A runtime adapts one library and lives in one package. The engine calls `prepare` and `estimate`
before anything is loaded, `load` and `unload` one at a time, and `LoadedModel.run` as often as
leases allow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client.registry import CollectorRegistry

from engine.config import ModelConfig
from engine.events import Event
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.lora_folder import lora_files
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.memory.host_memory import HostMemory
from engine.model_folder import WANTED_FILES, local_folder
from engine.requests import Request
from engine.runtimes.recognised import Recognised
from engine.section import Section
from engine.status import ProviderStatus
from engine.tracing import Tracer
from engine.usage import Usage


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice that a speech model can be asked for."""

    id: str
    name: str
    language: str | None = None
    """ISO 639-1 with or without a region; None: any."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed every check without a loaded model.

    `request` has the model's defaults in the engine's own fields. `payload` is the runtime's
    parsed form. `working_bytes` is an estimate of the device memory the
    run needs on top of the model's blocks.
    """

    request: Request
    payload: Any
    working_bytes: int = 0
    shape: str = ""
    """What the working memory depends on. A run of that shape that gives `WorkingMemory` corrects
    the estimate of the next; runs without a shape are never corrected."""
    usage: Usage = field(default_factory=Usage, compare=False)
    """What the run takes. A run counts tokens here, and what only the library knows."""


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


@dataclass(frozen=True, slots=True)
class RuntimeContext:
    """Where a runtime works. The engine makes it once the device is open."""

    device: Device
    cache_dir: Path
    """Where models that are built here are kept."""
    host: HostMemory | None = None
    """Where master copies go; None: there are none, and no model can be parked."""
    budget_bytes: int | None = None
    """What all models together may use of the device; None: nobody has said."""
    tracer: Tracer | None = None
    """Told of requests to providers."""


class Runtime(ABC):
    """The adapter of one native library.

    A new runtime is a package and a line of `engine.runtimes.registry.REGISTRY`. Nothing else
    knows it. The module named there has the subclass, and importing it imports no library: the
    commands read the class attributes and class methods without an engine.

    The class says what others must know of it:

    - `name`, as in the registry, and `tasks`;
    - `Options`, what `options` of its models may hold. The configuration is checked against it
      when it is read. Later `model.options_as(Options)` is the parsed form;
    - `hub_sources`, what is fetched of a hub;
    - `recognise`, whether a repository holds one of its models (optional);
    - `lora_folder`, where the LoRAs of a model are, and `adapters`, those that a request may name
      behind the model (optional).

    The engine makes one instance with a `RuntimeContext`, then calls `start` and `warm_up`. For
    each request it calls `prepare`, and for each model `estimate`, before anything is loaded.
    `load` gives a `LoadedModel`, whose `run` serves requests until `unload`. A runtime with
    parkable blocks also has `park` and `wake`.

    A library on torch needs less: `engine.runtimes.common.torch_model` has load, park, wake,
    unload and a thread for each model, and `engine.runtimes.common.speech` has the checks of
    speech.
    """

    name: ClassVar[str]

    tasks: ClassVar[tuple[str, ...]]
    """The values of `task` that its models may have."""

    Options: ClassVar[type[Section]]
    """What `options` of a model of this runtime may hold."""

    repeats_itself: ClassVar[bool] = False
    """Whether equal requests get equal answers also without a seed."""

    takes_no_device: ClassVar[bool] = False
    """Whether its models have no bytes. Then they are brought in before the first request, and
    stay."""

    peft_loras: ClassVar[bool] = False
    """Whether a LoRA is a folder with the two files of PEFT, rather than one file."""

    metrics: CollectorRegistry | None = None
    """The library's own metric series, if it has any."""

    def __init__(self, context: RuntimeContext) -> None:
        """Note where models go and where their files are kept; import nothing."""
        self.context = context

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """What a model reads of a hub, its own files first. Sources that are local may be named.

        A model without files of its own has none.
        """
        return (HubSource(model.source, WANTED_FILES),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:  # noqa: ARG003 - few marks
        """The entry for a repository of the hub; None if this runtime does not read it.

        The runtimes are asked from the last line of the registry to the first.

        Raises:
            LoadFailed: it is a model of this library, but not in a form that can be served here.

        """
        return None

    @classmethod  # noqa: B027 - most runtimes have nothing to look at
    def check(cls, model: ModelConfig) -> None:
        """Look whether the keys of a model fit each other, when the configuration is read.

        Raises:
            ValueError: they do not. It begins with the key, as in `source: it is no URL`.

        """

    @classmethod
    def lora_folder(cls, model: ModelConfig) -> Path | None:  # noqa: ARG003 - few have one
        """Where LoRAs for the model may be put, by name; None if it takes none."""
        return None

    @classmethod
    def lora_files(cls, model: ModelConfig) -> Mapping[str, Path]:
        """The LoRAs in that folder by name, each a file or a folder."""
        return lora_files(cls.lora_folder(model))

    @classmethod
    def lora_names(cls, model: ModelConfig) -> tuple[str, ...]:
        """All LoRAs of the model, also those that the configuration names one by one."""
        return tuple(cls.lora_files(model))

    @classmethod
    def adapters(cls, model: ModelConfig) -> tuple[str, ...]:  # noqa: ARG003 - few have any
        """The LoRAs that may follow the model's id in a request: `ID:ADAPTER`. Quick."""
        return ()

    @classmethod
    def check_lora(cls, model: ModelConfig, folder: Path, cache_dir: Path) -> None:
        """Return if a new LoRA, in a folder of its own, can be served on the model.

        Only runtimes with `peft_loras` are asked.

        Raises:
            InvalidRequest: with the reason.

        """
        raise NotImplementedError(f"{cls.name} takes no LoRAs of PEFT")

    async def forget_lora(self, loaded: LoadedModel, name: str) -> None:  # noqa: B027 - few keep any
        """Drop what the loaded model keeps of a LoRA that nobody uses: its files will go."""

    def _folder(self, model: ModelConfig) -> Path:
        """The folder of the model's own files, built if need be.

        Raises:
            LoadFailed: they are not here.

        """
        return self._folder_of(self.hub_sources(model)[0])

    def _folder_of(self, source: HubSource) -> Path:
        return local_folder(source.repo, self.context.cache_dir, revision=source.revision)

    @abstractmethod
    def start(self) -> None:
        """Import the library and do what must happen once per process.

        Called off the event loop, before the heap is frozen; may take many seconds.
        """

    async def warm_up(self) -> None:  # noqa: B027 - most libraries need none
        """Do what the first load would otherwise do for the whole process.

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

        If the model dies later, the runtime calls `on_failure(reason)` on the event loop. On any
        error it first gives back everything that it took.

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
            OutOfDeviceMemory: there is no room for all of them. They are parked as before.
            LoadFailed: they could not be brought back. They are parked as before.

        """
        raise NotImplementedError(f"{self.name} has no parkable blocks")

    def inputs(self, model: ModelConfig) -> frozenset[str] | None:  # noqa: ARG002 - few can tell
        """What a request to a model of text may hold: `text`, `image`, `audio`, `video`. Quick.

        None: nobody knows, as while its files are not here.
        """
        return None

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:  # noqa: ARG002 - few have any
        """The voices of a speech model, read from its files. Called off the event loop.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """
        return ()

    def providers(self) -> tuple[ProviderStatus, ...]:
        """How the providers of its models are, if others than this process serve them."""
        return ()

    async def check_alive(self) -> None:  # noqa: B027 - most libraries have no thread of their own
        """Return once the library's own threads have answered."""

    async def stop(self) -> None:  # noqa: B027 - most libraries have nothing to stop
        """Give back what `start` took."""
