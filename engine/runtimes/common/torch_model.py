"""Shared by the runtimes of torch models: load, park, wake, unload, and one thread a model.

Nothing here imports torch. The model itself and its runs are in `torch_run`.
"""

from __future__ import annotations

import asyncio
import gc
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine.config import ModelConfig
from engine.errors import LoadFailed, OutOfDeviceMemory, reason
from engine.events import Event
from engine.memory.block import Block
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.compute_thread import ComputeThread
from engine.runtimes.common.loading import load_on_thread
from engine.runtimes.common.thread_run import Emit, ThreadRun, run_on_thread
from engine.runtimes.common.torch_errors import torch_error

if TYPE_CHECKING:
    from engine.runtimes.common.torch_run import TorchParts

PartsT = TypeVar("PartsT", bound="TorchParts")


class TorchModel(LoadedModel, Generic[PartsT]):
    """One model on its own thread, because the libraries keep state while they run."""

    max_concurrency = 1

    def __init__(self, model: PartsT, model_id: str) -> None:
        """`model` is in host memory. `TorchRuntime.load` brings it onto the device."""
        self.model: PartsT | None = model
        """None once it is unloaded."""
        self.thread = ComputeThread(model_id)

    def blocks(self) -> tuple[Block, ...]:
        """Every part by its tensors."""
        assert self.model is not None
        weights = self.model.weights
        sizes = weights.block_bytes().items()
        return tuple(Block(name, nbytes, weights.parkable) for name, nbytes in sizes if nbytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copies."""
        return 0 if self.model is None else self.model.weights.host_bytes

    @abstractmethod
    def make_run(self, prepared: Prepared, emit: Emit) -> ThreadRun:
        """A run of the request on this model, not begun.

        Raises:
            InvalidRequest: the model cannot do this, which only the loaded model shows.

        """

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Run one request. Closing the generator stops it within one module."""
        make_run = partial(self.make_run, prepared)
        async with aclosing(run_on_thread(self.thread, make_run, torch_error)) as events:
            async for event in events:
                yield event


class TorchRuntime(Runtime):
    """Loads models that torch runs, one at a time, on its own thread."""

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._loader = ComputeThread(f"{self.name}-load")

    @abstractmethod
    def _build(self, model: ModelConfig) -> TorchModel[Any]:
        """The model, filled, in host memory. Called on the loading thread, outside of the gate.

        Raises:
            EngineError: it cannot be built; the message has the reason.
            Exception: any error of the library.

        """

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - no model here fails between runs
    ) -> LoadedModel:
        """Build the model and bring it onto the device, on the loading thread."""
        return await load_on_thread(self._loader, self._load, model, self._collect)

    def _load(self, model: ModelConfig) -> LoadedModel:
        loaded = self._build(model)
        assert loaded.model is not None
        loaded.model.place(self.context.host)
        return loaded

    async def unload(self, loaded: LoadedModel) -> None:
        """Drop the model, its master copies and its thread."""
        assert isinstance(loaded, TorchModel)
        await asyncio.get_running_loop().run_in_executor(self._loader, self._drop, loaded)

    def _drop(self, loaded: TorchModel[Any]) -> None:
        # For a moment after a run, its thread still holds the model.
        loaded.thread.shutdown()
        if loaded.model is not None:
            loaded.model.close()
            loaded.model = None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        self.context.device.release_cached()

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Drop the bytes of these parts on the device."""
        assert isinstance(loaded, TorchModel) and loaded.model is not None
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, self._park, loaded.model, blocks)

    def _park(self, model: TorchParts, blocks: Collection[str]) -> None:
        model.park(blocks)
        self.context.device.release_weights()

    async def wake(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Copy parts from their masters to the device.

        Raises:
            OutOfDeviceMemory: there is no room for all of them. They are parked as before.
            LoadFailed: they could not be brought back. They are parked as before.

        """
        assert isinstance(loaded, TorchModel) and loaded.model is not None
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._loader, self._wake, loaded.model, blocks)
        except Exception as error:
            known = torch_error(error)
            if isinstance(known, OutOfDeviceMemory):
                raise known from error
            raise LoadFailed(reason(error)) from error

    def _wake(self, model: TorchParts, blocks: Collection[str]) -> None:
        try:
            model.wake(blocks)
        except BaseException:
            self.context.device.release_weights()
            raise

    async def stop(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()
