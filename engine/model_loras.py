"""The LoRAs of an engine's models: which there are, and how one is deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from engine.config import ModelConfig
from engine.errors import Conflict
from engine.residency import Residency
from engine.runtimes.base import Runtime
from engine.runtimes.registry import runtime_class
from engine.scheduling.scheduler import Scheduler


class ModelLoras:
    """What the runtimes know of LoRAs, without those that are just leaving."""

    def __init__(
        self,
        runtimes: Mapping[str, Runtime],
        given: Collection[str],
        residency: Residency,
        scheduler: Scheduler,
    ) -> None:
        """`given` are the names of runtimes that are not the registry's."""
        self._runtimes = runtimes
        self._given = given
        self._residency = residency
        self._scheduler = scheduler
        self._leaving: set[tuple[str, str]] = set()
        """Models and those of their LoRAs whose files are just being deleted."""

    def adapters(self, model: ModelConfig) -> tuple[str, ...]:
        """The adapters of a model that may follow its id in a request: `ID:ADAPTER`."""
        found = self._kind(model).adapters(model)
        if not self._leaving:
            return found
        return tuple(each for each in found if (model.id, each) not in self._leaving)

    def names(self, model: ModelConfig) -> tuple[str, ...]:
        """All LoRAs of a model."""
        return self._kind(model).lora_names(model)

    async def remove(self, model: ModelConfig, lora: str, delete: Callable[[], int]) -> int:
        """Delete the files of a LoRA by `delete`, on a thread; returns the freed bytes.

        Raises:
            Conflict: requests use the LoRA.
            Exception: what `delete` raised.

        """
        if users := self._scheduler.users_of(model.id, lora):
            raise Conflict(
                f"The LoRA {lora!r} of {model.id!r} is in use by {users} requests.", param="name"
            )
        self._leaving.add((model.id, lora))
        try:
            loaded = self._residency.loaded.get(model.id)
            if loaded is not None:
                await self._runtimes[model.runtime].forget_lora(loaded, lora)
            return await asyncio.to_thread(delete)
        finally:
            self._leaving.discard((model.id, lora))

    def _kind(self, model: ModelConfig) -> Runtime | type[Runtime]:
        """The model's runtime, or its class before the start."""
        runtime = self._runtimes.get(model.runtime)
        if runtime is not None:
            return runtime
        return Runtime if model.runtime in self._given else runtime_class(model.runtime)
