"""Carries the scheduler's transitions out, and reports each outcome to it as an event."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import psutil

from engine.config import ModelConfig
from engine.errors import EngineError, LoadFailed, reason
from engine.memory.block import Estimate
from engine.memory.device import CpuDevice, Device
from engine.memory.host_memory import HostMemory
from engine.process.faults import FAULTS
from engine.process.switches import quick_switches
from engine.runtimes.base import LoadedModel, Runtime
from engine.scheduling.estimates import EstimateStore
from engine.scheduling.scheduler import Scheduler
from engine.status import MOVING, HostStatus
from engine.units import format_size

log = logging.getLogger(__name__)

LEAK_SHARE = 0.02
"""The share of a model's bytes that an unload may leave behind without a warning."""

LEAK_BYTES = 16 * 1024**2
"""What an allocator may keep for itself. A smaller leak cannot be distinguished from it."""


class ModelFiles(Protocol):
    """What is needed of `engine.catalog.fetcher.Fetcher`."""

    async def estimate(self, model: ModelConfig) -> Estimate:
        """What the model will take, read from its files, which are fetched first if need be."""

    async def bring_again(self, model: ModelConfig) -> None:
        """Fetch the files that are not here, or not any more."""


class Residency:
    """The scheduler's effects. Every method returns at once; an event has the outcome."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        runtimes: Mapping[str, Runtime],
        files: ModelFiles,
        clock: Callable[[], float],
        on_residual: Callable[[str, int], None] = lambda _model_id, _nbytes: None,
    ) -> None:
        """Start with nothing loaded.

        `on_residual(model, bytes)` gets the bytes that each unload did not give back.
        """
        self.outcomes: Scheduler
        """Receives the outcomes. Set once, before the first call: the two know each other."""
        self.loaded: dict[str, LoadedModel] = {}
        self._models = models
        self._runtimes = runtimes
        self._files = files
        self._device: Device | None = None
        self._estimates: EstimateStore | None = None
        self._host: HostMemory | None = None
        self._clock = clock
        self._on_residual = on_residual
        self._overhead_before: dict[str, int] = {}
        """Bytes in use beyond all models, just before each model was loaded."""
        self._parked_blocks: dict[str, frozenset[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, device: Device, estimates: EstimateStore, host: HostMemory) -> None:
        """Name the device, its remembered estimates, and the host memory for host copies.

        No model can be loaded before.
        """
        self._device = device
        self._estimates = estimates
        self._host = host

    def estimate(self, model_id: str) -> None:
        """Find out what a model will take: by the last measurement, otherwise from its files."""
        self._start(model_id, self._estimate(self._models[model_id]))

    def prefetch(self, model_id: str) -> None:
        """Read a model's files into the system's cache while other models still use the device."""
        self._start(model_id, self._prefetch(self._models[model_id]))

    def load(self, model_id: str) -> None:
        """Bring a model onto the device."""
        self._start(model_id, self._load(self._models[model_id]))

    def unload(self, model_id: str, reason: str) -> None:
        """Take a model off the device."""
        log.info("unloading %s: %s", model_id, reason)
        self._start(model_id, self._unload(model_id))

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:
        """Take blocks off the device; the model stays loaded."""
        log.info("parking %s of %s: %s", ", ".join(sorted(blocks)), model_id, reason)
        self._start(model_id, self._park(model_id, blocks))

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:
        """Bring parked blocks back."""
        self._start(model_id, self._wake(self._models[model_id], blocks))

    def measure_external(self) -> int:
        """External bytes of the device, measured now."""
        if self._device is None or self._host is None:
            return 0
        return self._device.external_bytes() + _copies_bytes(self._device, self._host)

    def host_status(self) -> HostStatus:
        """The budget of host copies, and the bytes used of it."""
        if self._host is None:
            return HostStatus(0, 0)
        spares = self._host.spare_bytes()
        return HostStatus(self._host.budget_bytes, self._host.used_bytes, spares)

    def host_free_bytes(self) -> int:
        """Bytes that are free in the budget of host copies, if what may go at any time goes."""
        return self._host.free_bytes if self._host is not None else 0

    def call_at(self, when: float) -> None:
        """Ask for `on_timer` at that clock time. It replaces the time of the last call."""
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, when - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    async def stop(self) -> None:
        """Wait for running transitions, then take all models out. No event follows."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()
        for model_id in list(self.loaded):
            await self._take_out(model_id)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self.outcomes.on_timer()
        except Exception as error:
            FAULTS.report("the timer of the scheduler", error)

    def _start(self, model_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._to_an_outcome(model_id, work))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            FAULTS.report("the end of a transition", error)

    async def _to_an_outcome(self, model_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Do the work. If it ends by a bug, report that and tell the scheduler an outcome.

        Every expected failure is an event already. Without an outcome the model would move for
        ever, and all others would wait for it.
        """
        try:
            with quick_switches():
                await work
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise  # the loop ends, and nobody waits for an outcome
            FAULTS.report(f"moving the model {model_id!r}", error)
            if self.outcomes.report.model(model_id).state in MOVING:
                await self._abandon(model_id)
            self.outcomes.on_transition_lost(model_id, reason(error))

    async def _abandon(self, model_id: str) -> None:
        """Free what can be freed of a model of which nobody knows the state."""
        loaded = self.loaded.pop(model_id, None)
        self._parked_blocks.pop(model_id, None)
        self._overhead_before.pop(model_id, None)
        if loaded is not None:
            await self._unload_whatever_comes(model_id, loaded)

    def _runtime(self, model: ModelConfig) -> Runtime:
        return self._runtimes[model.runtime]

    async def _estimate(self, model: ModelConfig) -> None:
        estimate = self._estimates.get(model) if self._estimates is not None else None
        if estimate is None:
            try:
                estimate = await self._files.estimate(model)
            except Exception as error:
                self.outcomes.on_estimate_failed(model.id, str(_load_error(model, error)))
                return
        self.outcomes.on_estimate(model.id, estimate)

    async def _prefetch(self, model: ModelConfig) -> None:
        try:
            read_bytes = await asyncio.to_thread(_read_ahead, self._runtime(model), model)
        except (OSError, EngineError) as error:
            log.debug("cannot read the files of %s ahead: %s", model.id, error)
        except Exception:  # a library's, and no reason to end anything
            log.exception("cannot read the files of %s ahead", model.id)
        else:
            log.debug("reading %s of %s ahead", format_size(read_bytes), model.id)

    async def _load(self, model: ModelConfig) -> None:
        log.info("loading %s", model.id)
        started_s = time.perf_counter()

        def on_failure(reason: str) -> None:
            self.outcomes.on_model_failed(model.id, reason)

        self._overhead_before[model.id] = self._overhead_bytes()
        try:
            await self._files.bring_again(model)
            loaded = await self._runtime(model).load(model, on_failure)
        except Exception as error:
            self.outcomes.on_load_failed(model.id, _load_error(model, error))
            return
        self.loaded[model.id] = loaded
        load_seconds = time.perf_counter() - started_s
        measured = Estimate(blocks=loaded.blocks(), load_seconds=load_seconds)
        self.outcomes.on_loaded(
            model.id, measured.blocks, load_seconds, loaded.max_concurrency, loaded.host_bytes
        )
        if self._estimates is not None:
            try:
                await asyncio.to_thread(self._estimates.put, model, measured)
            except Exception:  # the model is there, whatever becomes of the notes about it
                log.exception("cannot remember what %s takes", model.id)

    async def _park(self, model_id: str, blocks: frozenset[str]) -> None:
        try:
            await self._runtime(self._models[model_id]).park(self.loaded[model_id], blocks)
        except Exception as error:
            # Bytes that are still there count as external bytes. The model must not run again.
            log.exception("parking %s failed", model_id)
            self.outcomes.on_model_failed(model_id, f"could not be parked: {error}")
        self._parked_blocks[model_id] = self._parked_blocks.get(model_id, frozenset()) | blocks
        self.outcomes.on_parked(model_id)

    async def _wake(self, model: ModelConfig, blocks: frozenset[str]) -> None:
        started_s = time.perf_counter()
        try:
            await self._runtime(model).wake(self.loaded[model.id], blocks)
        except Exception as error:
            self.outcomes.on_wake_failed(model.id, _load_error(model, error))
            return
        self._parked_blocks.pop(model.id, None)
        self.outcomes.on_woken(model.id, time.perf_counter() - started_s)

    async def _unload(self, model_id: str) -> None:
        await self._take_out(model_id)
        self.outcomes.on_unloaded(model_id)

    async def _take_out(self, model_id: str) -> None:
        loaded = self.loaded.pop(model_id)
        nbytes = sum(block.nbytes for block in loaded.blocks())
        self._parked_blocks.pop(model_id, None)
        await self._unload_whatever_comes(model_id, loaded)
        del loaded
        self._check_leak(model_id, nbytes)

    async def _unload_whatever_comes(self, model_id: str, loaded: LoadedModel) -> None:
        """Have the runtime unload a model; an error is logged only.

        From here on the bytes count as free. The really free bytes are measured.
        """
        try:
            await self._runtime(self._models[model_id]).unload(loaded)
        except Exception:
            log.exception("unloading %s failed", model_id)

    def _overhead_bytes(self) -> int:
        """Bytes that the process uses of the device beyond the blocks of the models there.

        Working memory of running requests is in it, and so are pages of a KV cache that were
        never touched: the measure has some noise.
        """
        if self._device is None or self._host is None:
            return 0
        held_bytes = sum(
            block.nbytes
            for model_id, loaded in self.loaded.items()
            for block in loaded.blocks()
            if block.name not in self._parked_blocks.get(model_id, ())
        )
        copies_bytes = _copies_bytes(self._device, self._host)
        return self._device.own_bytes() - held_bytes - copies_bytes

    def _check_leak(self, model_id: str, nbytes: int) -> None:
        before = self._overhead_before.pop(model_id, None)
        if before is None:
            return
        residual_bytes = max(0, self._overhead_bytes() - before)
        self._on_residual(model_id, residual_bytes)
        if residual_bytes > max(LEAK_BYTES, LEAK_SHARE * nbytes):
            log.warning(
                "%s of %s were not given back by its unload, or others took them meanwhile",
                format_size(residual_bytes),
                model_id,
            )


def _copies_bytes(device: Device, host: HostMemory) -> int:
    """Device bytes of host copies. On a CPU the device is host memory, so they are in it."""
    return host.used_bytes if device.kind == CpuDevice.kind else 0


def _read_ahead(runtime: Runtime, model: ModelConfig) -> int:
    """Ask the system to read the weights into its cache; returns their bytes.

    None are read if they take more than half of the unused and cached memory: other programs read
    a good part of that cache.

    Raises:
        OSError: a file cannot be opened.
        EngineError: the model's files are not here.

    """
    sizes = {path: path.stat().st_size for path in runtime.weight_files(model)}
    if sum(sizes.values()) > psutil.virtual_memory().available // 2:
        return 0
    for path in sizes:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
    return sum(sizes.values())


def _load_error(model: ModelConfig, error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        log.error("cannot load %s: %s", model.id, error)
        return error
    log.exception("cannot load %s", model.id, exc_info=error)
    return LoadFailed(f"{type(error).__name__}: {error}")
