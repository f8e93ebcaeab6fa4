"""Carries decisions out: estimates, loads and unloads models, and reports back as events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from engine.config import ModelConfig
from engine.device import Device
from engine.errors import EngineError, LoadFailed
from engine.estimates import EstimateStore
from engine.runtimes.base import Estimate, LoadedModel, Runtime
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)


class Residency:
    """The scheduler's hands: every method returns at once, the outcome comes as an event."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        runtimes: Mapping[str, Runtime],
        clock: Callable[[], float],
    ) -> None:
        self.outcomes: Scheduler
        """Who is told how it went. Set once, before the first call: the two know each other."""
        self.loaded: dict[str, LoadedModel] = {}
        self._models = models
        self._runtimes = runtimes
        self._device: Device | None = None
        self._estimates: EstimateStore | None = None
        self._clock = clock
        self._leaving: dict[str, list[asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, device: Device, estimates: EstimateStore) -> None:
        """Name the device and what is remembered of it; nothing can be loaded before."""
        self._device = device
        self._estimates = estimates

    def gone(self, model_id: str) -> asyncio.Future[None]:
        """Done once the model is off the device; at once if it is not there."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if model_id in self.loaded or model_id in self._leaving:
            self._leaving.setdefault(model_id, []).append(future)
        else:
            future.set_result(None)
        return future

    def estimate(self, model_id: str) -> None:
        """Find out what a model will take: as measured last time, else from its files."""
        self._start(self._estimate(self._models[model_id]))

    def load(self, model_id: str) -> None:
        """Bring a model onto the device."""
        self._start(self._load(self._models[model_id]))

    def unload(self, model_id: str, reason: str) -> None:
        """Take a model off the device."""
        log.info("unloading %s: %s", model_id, reason)
        self._start(self._unload(model_id))

    def measure_foreign(self) -> int:
        """Bytes of the device that others use, measured now."""
        return self._device.foreign_bytes() if self._device is not None else 0

    def call_at(self, when: float) -> None:
        """Ask for `on_timer` at that clock time, instead of the time asked for before."""
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, when - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    async def stop(self) -> None:
        """Wait for what is under way, then take out what is still in use; no event follows."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()
        for model_id in list(self.loaded):
            await self._take_out(model_id)

    def _on_timer(self) -> None:
        self._timer = None
        self.outcomes.on_timer()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Every expected failure is an event; this is a bug, and must not be silent.
            log.critical("a transition ended without an outcome", exc_info=error)

    def _runtime(self, model: ModelConfig) -> Runtime:
        return self._runtimes[model.runtime]

    async def _estimate(self, model: ModelConfig) -> None:
        estimate = self._estimates.get(model) if self._estimates is not None else None
        if estimate is None:
            try:
                estimate = await asyncio.to_thread(self._runtime(model).estimate, model)
            except Exception as error:
                reason = str(_load_error(model, error))
                self.outcomes.on_estimate_failed(model.id, reason)
                return
        self.outcomes.on_estimate(model.id, estimate)

    async def _load(self, model: ModelConfig) -> None:
        log.info("loading %s", model.id)
        started_s = time.perf_counter()

        def on_failure(reason: str) -> None:
            self.outcomes.on_model_failed(model.id, reason)

        try:
            loaded = await self._runtime(model).load(model, on_failure)
        except Exception as error:
            self.outcomes.on_load_failed(model.id, _load_error(model, error))
            return
        self.loaded[model.id] = loaded
        load_seconds = time.perf_counter() - started_s
        measured = Estimate(blocks=loaded.blocks(), load_seconds=load_seconds)
        self.outcomes.on_loaded(model.id, measured.blocks, load_seconds, loaded.max_concurrency)
        if self._estimates is not None:
            await asyncio.to_thread(self._estimates.put, model, measured)

    async def _unload(self, model_id: str) -> None:
        self._leaving.setdefault(model_id, [])
        await self._take_out(model_id)
        self.outcomes.on_unloaded(model_id)
        for future in self._leaving.pop(model_id):
            if not future.done():
                future.set_result(None)

    async def _take_out(self, model_id: str) -> None:
        loaded = self.loaded.pop(model_id)
        try:
            await self._runtime(self._models[model_id]).unload(loaded)
        except Exception:
            # The bytes are counted as free from here on; what is really free is measured.
            log.exception("unloading %s failed", model_id)


def _load_error(model: ModelConfig, error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        log.error("cannot load %s: %s", model.id, error)
        return error
    log.exception("cannot load %s", model.id, exc_info=error)
    return LoadFailed(f"{type(error).__name__}: {error}")
