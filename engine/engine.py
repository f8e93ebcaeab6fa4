"""The façade: everything a server needs of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.registry import CollectorRegistry

from engine.config import EngineConfig, ModelConfig
from engine.errors import (
    ConfigError,
    Conflict,
    EngineError,
    NotLoaded,
    OutOfDeviceMemory,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import Document, Event, Frame, Progress, WorkingMemory
from engine.memory.block import Estimate
from engine.memory.device import CudaDevice, Device, host_memory_bytes, open_device
from engine.memory.host_memory import HostMemory
from engine.metrics import EngineMetrics
from engine.process.health import wait_for_fault
from engine.process.heap import freeze_heap, thaw_heap, uncollected
from engine.process.library_logs import quiet_libraries
from engine.process.torch_state import share_torch_state
from engine.requests import Priority, Request, SchedulingOptions
from engine.residency import Residency
from engine.runtimes.base import Prepared, Runtime, Voice
from engine.runtimes.registry import runtime_class
from engine.scheduling.estimates import EstimateStore
from engine.scheduling.event_log import EventLog
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Ledger
from engine.scheduling.planner import COMPLETE
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.scheduling.ticket import Ticket
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from engine.status import EngineState, EngineStatus, Forecast, ModelState, ModelStatus, Restarts
from engine.units import format_size

log = logging.getLogger(__name__)

_STAGES = {ModelState.LOADING: Stage.LOADING, ModelState.WAKING: Stage.WAKING}

SIZE_TIMEOUT_S = 1.0
"""How long a request that is to be refused may wait for what is told with the refusal."""

FAILURES = frozenset({EventKind.LOAD_FAILED, EventKind.WAKE_FAILED, EventKind.MODEL_FAILED})
"""What a device that lost its state would look like."""

EXTERNAL_CHECK_S = 5.0
"""How often the use of the device by others is looked at while nothing else happens."""


WORKING_MARGIN = 0.05
"""What a run is granted above the peak measured last: allocators differ from run to run."""

OUT_OF_MEMORY_FACTOR = 1.5
"""How much more a shape is granted after it ran out of device memory."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in milliseconds."""

    queue_ms: float
    load_ms: float
    run_ms: float
    """To the first event of a stream; the whole run of a document."""
    tier: str
    """Where the model was when the request came: `device`, `host` or `disk`."""


@dataclass(slots=True)
class Peak:
    """Device bytes that a run took at most above its model's blocks; None until it is measured."""

    nbytes: int | None = None


class Session:
    """A request that runs: its first event is here already, so it has not failed so far."""

    def __init__(
        self,
        model: ModelConfig,
        first: Event,
        rest: AsyncGenerator[Event, None],
        lease: Lease,
        timings: Timings,
        peak: Peak,
    ) -> None:
        self.model = model
        self.first = first
        self.timings = timings
        self.peak = peak
        self.again: Callable[[], Awaitable[Session]] | None = None
        """How to run the request once more after it ran out of device memory."""
        self._rest = rest
        self._lease = lease

    async def events(self) -> AsyncGenerator[Event, None]:
        """The whole run, `first` included. Closing it cancels the work.

        A run that gave no more than progress before it ran out of device memory is tried once
        more, alone.

        Raises:
            EngineError: the run failed part-way.

        """
        given = False
        try:
            event = self.first
            while True:
                given = given or not isinstance(event, Progress)
                yield event
                try:
                    event = await anext(self._rest)
                except StopAsyncIteration:
                    return
                except OutOfDeviceMemory as error:
                    if given or self.again is None:
                        raise
                    log.warning("%s; trying once more, alone", error)
                    await self.close()
                    second, self.again = await self.again(), None
                    self._rest, self._lease, self.peak = second._rest, second._lease, second.peak
                    event = second.first
        finally:
            await self.close()

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """The stream of a text model. Closing it cancels the work.

        Raises:
            EngineError: the run failed part-way.

        """
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, Frame):
                    yield event

    async def close(self) -> None:
        """Stop what still runs and end the lease."""
        try:
            await self._rest.aclose()
        finally:
            self._lease.release()


class Engine:
    """One device, one ledger, many models."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        device: Device | None = None,
        runtimes: Mapping[str, Runtime] | None = None,
        restarts: Restarts | None = None,
        restore: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Cheap: opens no device and imports no library before `start`.

        `device` and `runtimes` take the place of what the configuration names. `restarts` is only
        reported. The models of `restore` are brought in after the start, in that order, as far as
        they fit.
        """
        self.config = config
        self._restarts = restarts or Restarts()
        self._to_restore = restore
        self.state = EngineState.STARTING
        self._clock = clock
        self._device = device
        self._runtimes: dict[str, Runtime] = dict(runtimes or {})
        self._models = {model.id: model for model in config.models}
        self.events = EventLog()
        """What the scheduler did, in words; closed when the engine has drained."""
        self._estimates: EstimateStore | None = None
        self._ledger = Ledger(0, 0)
        self._metrics = EngineMetrics(self.status)
        self._residency = Residency(self._models, self._runtimes, clock, self._metrics.residual)
        self._scheduler = Scheduler(
            config,
            self._ledger,
            self._residency,
            clock,
            on_event=self._on_event,
            created=int(time.time()),
        )
        self._residency.outcomes = self._scheduler
        self._started = asyncio.Event()
        self._emptied = asyncio.Event()
        self._start_error: str | None = None
        self._recheck = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._preloads: list[asyncio.Task[None]] = []
        self._fetches: dict[str, asyncio.Task[Estimate]] = {}
        self._with_files: set[str] = set()

    @property
    def metrics(self) -> CollectorRegistry:
        """The engine's own series."""
        return self._metrics.registry

    def registries(self) -> tuple[CollectorRegistry, ...]:
        """Every registry: the engine's and the libraries'."""
        own = [runtime.metrics for runtime in self._runtimes.values()]
        return (self.metrics, *(registry for registry in own if registry is not None))

    async def start(self) -> None:
        """Open the device, import the libraries, begin to load the pinned models.

        Raises:
            ConfigError: the device that the configuration names is not there, or a library.

        """
        try:
            with uncollected():
                device = await asyncio.to_thread(self._open)
                freeze_heap()  # or a warm-up's collections look at all that is imported
                for runtime in self._runtimes.values():
                    await runtime.warm_up()
        except Exception as error:
            thaw_heap()
            self._start_error = str(error) or type(error).__name__
            self.state = EngineState.STOPPED
            self._started.set()
            raise
        freeze_heap()
        device.set_baseline()
        self._device = device
        self._estimates = EstimateStore(self.config.state_dir, device.name)
        host_budget = self.config.host_memory_budget(device.kind)
        host_bytes = host_budget.budget_bytes(host_memory_bytes())
        host = HostMemory(host_bytes, pinned=device.kind == CudaDevice.kind)
        budget = self.config.memory_budget(device.kind)
        budget_bytes = budget.budget_bytes(device.total_bytes)
        self._residency.open(device, self._estimates, host, budget_bytes)
        self._ledger.set_device(budget_bytes, device.total_bytes)
        self._scheduler.on_timer()
        self._started.set()
        if self.state is not EngineState.STARTING:  # told to stop meanwhile
            return
        self.state = EngineState.READY
        self._watch = asyncio.create_task(self._watch_device())
        self._preloads = [
            asyncio.create_task(self._preload(model)) for model in self.config.models if model.pin
        ]
        self._preloads.append(asyncio.create_task(self._restore()))
        self._preloads.append(asyncio.create_task(self._warn_of_too_large()))

    def _open(self) -> Device:
        quiet_libraries()
        device = self._device or open_device(self.config.device)
        for name in {model.runtime for model in self.config.models} - self._runtimes.keys():
            self._runtimes[name] = runtime_class(name)(device, self.config.cache_dir)
        for name, runtime in self._runtimes.items():
            try:
                runtime.start()
            except ImportError as error:
                raise ConfigError(f"models: the runtime {name!r} cannot start: {error}") from error
        if "torch" in sys.modules:
            share_torch_state()
        return device

    async def drain(self, limit_s: float) -> None:
        """Refuse new work and wait for what runs, `limit_s` seconds at most."""
        self.state = EngineState.DRAINING
        self._scheduler.on_drain()
        for task in self._preloads:
            task.cancel()
        self._emptied.clear()
        if not self._scheduler.empty:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._emptied.wait()
        self.events.close()  # or whoever follows it would hold the server up

    async def stop(self) -> None:
        """Unload everything and let go of the libraries. Requests still running are cut off."""
        if self.state is not EngineState.DRAINING:
            await self.drain(0.0)
        if self._watch is not None:
            self._watch.cancel()
        await self._residency.stop()
        for runtime in self._runtimes.values():
            await runtime.stop()
        thaw_heap()
        self.state = EngineState.STOPPED

    async def wait_for_fault(self, hang_s: float, stall_s: float) -> str:
        """Return why this process must be replaced, in words; as long as all is well, wait.

        See `engine.process.health.wait_for_fault`. Call it once the engine has started.
        """
        assert self._device is not None
        return await wait_for_fault(self._device, self._recheck, hang_s, stall_s)

    def wanted(self) -> tuple[str, ...]:
        """The models that are there or being brought in, the most asked for first."""
        return self._scheduler.wanted()

    async def check_alive(self, timeout_s: float = 5.0) -> bool:
        """Whether the scheduler's loop and every library's own threads answer in time."""
        if self.state in (EngineState.STARTING, EngineState.STOPPED):
            return self.state is EngineState.STARTING
        try:
            async with asyncio.timeout(timeout_s):
                for runtime in self._runtimes.values():
                    await runtime.check_alive()
        except TimeoutError:
            return False
        return True

    def prepare(self, request: Request) -> Prepared:
        """Check a request and fill in its model's defaults, without waiting or loading.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: naming the field at fault.
            Overloaded: the engine is still starting or shuts down.

        """
        model = self.config.find(request.model)
        runtime = self._runtimes.get(model.runtime)
        if self.state is EngineState.STARTING or runtime is None:
            raise QueueTimeout("The engine is still starting.", retry_after_s=5.0)
        return runtime.prepare(model, request)

    async def open(self, request: Request, waiting: Waiting | None = None) -> Session:
        """Admit a request, load its model if need be, and wait for its first event.

        `waiting` lets others see meanwhile where the request stands: see `wait_status`.

        Raises:
            EngineError: whatever can go wrong before the first byte.

        """
        model = self.config.find(request.model)
        waiting = waiting or Waiting()
        timeout_s = request.scheduling.timeout_s
        if timeout_s is None:
            timeout_s = self.config.queue_timeout_s
        await self._wait_started(timeout_s)
        prepared = self._runtimes[model.runtime].prepare(model, request)
        waiting.stage = Stage.FETCHING
        if request.scheduling.if_loaded_only:
            await self.check_loaded(model.id)
        if prepared.working_bytes and not await self._has_files(model, timeout_s):
            # Only now its files tell what a run takes, and what it cannot do.
            prepared = self._runtimes[model.runtime].prepare(model, request)

        async def alone() -> Session:
            return await self._attempt(model, prepared, timeout_s, waiting, exclusive=True)

        try:
            session = await self._attempt(model, prepared, timeout_s, waiting, exclusive=False)
        except OutOfDeviceMemory as error:
            log.warning("%s: %s; trying once more, alone", request.request_id, error)
            return await alone()
        session.again = alone
        return session

    async def check_loaded(self, name: str) -> None:
        """Return if a model is there, or being brought in for others.

        Raises:
            ModelNotFound: there is no such model.
            NotLoaded: it is not, with what bringing it in would cost.

        """
        model = self.config.find(name)
        if self.model_status(model.id).state not in COMPLETE:
            raise await self._not_loaded(model)

    async def _not_loaded(self, model: ModelConfig) -> NotLoaded:
        # Reading the sizes takes moments where the files are here; else nobody knows yet.
        with contextlib.suppress(EngineError):
            await self._know_size(model, SIZE_TIMEOUT_S)
        forecast = self._scheduler.forecast(model.id)
        return NotLoaded(
            f"The model {model.id!r} is not loaded, and the request is for a loaded one only.",
            tier=forecast.tier,
            load_s=forecast.move_s,
            evicts=tuple(eviction.model for eviction in forecast.evictions),
        )

    async def plan(
        self, name: str, *, working_bytes: int = 0, priority: Priority = Priority.NORMAL
    ) -> Forecast:
        """What would be done for a request that came now; nothing is done.

        `working_bytes` is the device memory that its run would need beside the model.

        Raises:
            ModelNotFound: there is no such model.
            LoadFailed: its files are missing or unreadable.
            QueueTimeout: the engine is still starting, or the files still being fetched.

        """
        model = self.config.find(name)
        await self._wait_started(self.config.queue_timeout_s)
        await self._know_size(model, self.config.queue_timeout_s)
        return self._scheduler.forecast(model.id, working_bytes=working_bytes, priority=priority)

    async def _know_size(self, model: ModelConfig, timeout_s: float) -> None:
        """Let the scheduler know what the model takes, if it does not yet.

        Raises:
            LoadFailed: its files are missing or unreadable.
            QueueTimeout: they take longer to come. They go on coming.

        """
        if self.model_status(model.id).estimated_bytes is not None:
            return
        estimate = self._estimates.get(model) if self._estimates is not None else None
        if estimate is None:
            estimate = (await self._fetched(model, timeout_s)).result()
        self._scheduler.on_estimate(model.id, estimate)

    async def _has_files(self, model: ModelConfig, timeout_s: float) -> bool:
        """Whether the model's files were looked at before; else wait until they are here.

        Raises:
            QueueTimeout: they take longer to come. They go on coming.

        """
        if model.id in self._with_files:
            return True
        task = await self._fetched(model, timeout_s)
        if task.exception() is None:  # else the load will fail for the same reason, and tell it
            self._with_files.add(model.id)
        return False

    async def _fetched(self, model: ModelConfig, timeout_s: float) -> asyncio.Task[Estimate]:
        task = self._fetches.get(model.id)
        if task is None:
            estimate = self._runtimes[model.runtime].estimate
            task = asyncio.create_task(asyncio.to_thread(estimate, model))
            self._fetches[model.id] = task
            task.add_done_callback(lambda _: self._fetches.pop(model.id))
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            message = f"The files of the model {model.id!r} are still being fetched."
            raise QueueTimeout(message, retry_after_s=10.0)
        return task

    async def _wait_started(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._started.wait()
        except TimeoutError:
            raise QueueTimeout("The engine is still starting.", retry_after_s=5.0) from None
        if self._start_error is not None:
            raise RuntimeFailed(f"The engine could not start: {self._start_error}")
        if self.state in (EngineState.DRAINING, EngineState.STOPPED):
            raise ShuttingDown("The engine is shutting down.", retry_after_s=5.0)

    async def _attempt(
        self,
        model: ModelConfig,
        prepared: Prepared,
        timeout_s: float,
        waiting: Waiting,
        *,
        exclusive: bool,
    ) -> Session:
        request = prepared.request
        lease = await self._lease(
            model,
            request_id=request.request_id,
            operation=request.operation.value,
            working_bytes=self._working_bytes(model, prepared),
            scheduling=request.scheduling,
            timeout_s=timeout_s,
            exclusive=exclusive,
            waiting=waiting,
        )
        granted_at = self._clock()
        peak = Peak()
        events = self._residency.loaded[model.id].run(prepared)
        if prepared.shape:
            events = self._measured(model, prepared, events, peak)
        try:
            try:
                first = await anext(events)
            except StopAsyncIteration:
                raise RuntimeFailed("The model gave no answer.") from None
            if isinstance(first, Document):
                await events.aclose()
        except BaseException:
            await events.aclose()
            lease.release()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # A library may answer a cancellation with an error of its own.
                raise asyncio.CancelledError from None
            raise
        run_s = self._clock() - granted_at
        if isinstance(first, Document):
            lease.release()
        queue_s = lease.timings.queued_s - lease.timings.load_s
        for phase, seconds in (("queue", queue_s), ("load", lease.timings.load_s), ("run", run_s)):
            self._metrics.request_seconds.labels(model.id, phase).observe(seconds)
        timings = Timings(
            queue_s * 1e3, lease.timings.load_s * 1e3, run_s * 1e3, lease.timings.tier
        )
        return Session(model, first, events, lease, timings, peak)

    def wait_status(self, waiting: Waiting) -> WaitStatus:
        """Where a request stands on its way through `open`, at this moment."""
        if waiting.ticket is None:
            return WaitStatus(waiting.stage)
        ticket = self._scheduler.ticket_status(waiting.ticket)
        if ticket is None:  # granted or refused; `open` goes on in a moment
            return WaitStatus(Stage.RUNNING)
        state = self.model_status(waiting.ticket.model_id).state
        stage = _STAGES.get(state, Stage.QUEUED)
        return WaitStatus(stage, ticket.position, ticket.eta_s)

    def _working_bytes(self, model: ModelConfig, prepared: Prepared) -> int:
        """The measured peak of the last run of that shape and a margin, else the estimate."""
        measured = None
        if prepared.shape and self._estimates is not None:
            measured = self._estimates.working_bytes(model, prepared.shape)
        if measured is None:
            return prepared.working_bytes
        return int(measured * (1 + WORKING_MARGIN))

    async def _measured(
        self,
        model: ModelConfig,
        prepared: Prepared,
        events: AsyncGenerator[Event, None],
        peak: Peak,
    ) -> AsyncGenerator[Event, None]:
        assert self._estimates is not None  # a run needs a loaded model, a load the estimates
        remember = self._estimates.put_working_bytes
        async with contextlib.aclosing(events):
            try:
                async for event in events:
                    if isinstance(event, WorkingMemory):
                        peak.nbytes = event.nbytes
                        await asyncio.to_thread(remember, model, prepared.shape, event.nbytes)
                    else:
                        yield event
            except OutOfDeviceMemory:
                granted = self._working_bytes(model, prepared)
                more = int(granted * OUT_OF_MEMORY_FACTOR)
                await asyncio.to_thread(remember, model, prepared.shape, more)
                raise

    async def _lease(
        self,
        model: ModelConfig,
        *,
        request_id: str,
        operation: str,
        working_bytes: int = 0,
        scheduling: SchedulingOptions,
        timeout_s: float,
        waiting: Waiting,
        exclusive: bool = False,
        ignore_backoff: bool = False,
    ) -> Lease:
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()

        def on_granted(lease: Lease) -> None:
            if granted.cancelled():
                lease.release()
            else:
                granted.set_result(lease)

        def on_refused(error: EngineError) -> None:
            if not granted.cancelled():
                granted.set_exception(error)

        ticket = Ticket(
            request_id=request_id,
            model_id=model.id,
            operation=operation,
            working_bytes=working_bytes,
            priority=scheduling.priority,
            timeout_s=timeout_s,
            exclusive=exclusive,
            keep_alive_s=scheduling.keep_alive_s,
            if_loaded_only=scheduling.if_loaded_only,
            no_evict=scheduling.no_evict,
            on_granted=on_granted,
            on_refused=on_refused,
        )
        self._scheduler.on_request(ticket, ignore_backoff=ignore_backoff)
        waiting.stage, waiting.ticket = Stage.QUEUED, ticket
        try:
            lease = await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()  # granted in the very moment the caller left
            self._scheduler.on_cancel(ticket)
            raise
        except Conflict:  # of all refusals only that of `if_loaded_only`; what it costs is told
            raise await self._not_loaded(model) from None
        waiting.stage, waiting.ticket = Stage.RUNNING, None
        return lease

    async def voices(self, name: str) -> tuple[Voice, ...]:
        """The voices of a model; none if it does not speak.

        Raises:
            ModelNotFound: there is no such model.
            LoadFailed: its files are missing or unreadable.

        """
        model = self.config.find(name)
        await self._wait_started(self.config.queue_timeout_s)
        return await asyncio.to_thread(self._runtimes[model.runtime].voices, model)

    def status(self) -> EngineStatus:
        """Everything, at this moment."""
        return EngineStatus(
            state=self.state,
            device_kind=self._device.kind if self._device else self.config.device,
            device_name=self._device.name if self._device else "",
            ledger=self._ledger.status(),
            host=self._residency.host_status(),
            models=self._scheduler.models(),
            queue=self._scheduler.queue(),
            transition=self._scheduler.transition,
            restarts=self._restarts,
        )

    def model_status(self, name: str) -> ModelStatus:
        """One model, by id or alias.

        Raises:
            ModelNotFound: there is none.

        """
        return self._scheduler.model(self.config.find(name).id)

    async def load(self, name: str, scheduling: SchedulingOptions | None = None) -> None:
        """Bring a model in as if a request had asked for it, and return once it is ready.

        Raises:
            EngineError: it does not exist, does not fit, or cannot be loaded.

        """
        model = self.config.find(name)
        await self._wait_started(self.config.queue_timeout_s)
        lease = await self._lease(
            model,
            request_id=f"load-{model.id}",
            operation="load",
            scheduling=scheduling or SchedulingOptions(),
            timeout_s=self.config.queue_timeout_s,
            waiting=Waiting(),
            ignore_backoff=True,
        )
        lease.release()

    async def unload(self, name: str) -> None:
        """Take an idle model out, and return once its bytes are free.

        Raises:
            ModelNotFound: there is none.
            Conflict: it is in use, waited for, pinned, or being loaded.

        """
        model_id = self.config.find(name).id
        gone = self._residency.gone(model_id)
        self._scheduler.request_unload(model_id)
        await gone

    async def park(self, name: str) -> None:
        """Take an idle model off the device, and return once its bytes are free.

        It stays loaded, and comes back from its host copy. One that is off the device stays as
        it is.

        Raises:
            ModelNotFound: there is none.
            Conflict: it is in use, waited for, pinned, being moved, or cannot be parked.

        """
        model_id = self.config.find(name).id
        self._scheduler.request_park(model_id)
        if self.model_status(model_id).device_bytes:
            # Or it may leave altogether instead, if the engine shuts down meanwhile.
            ends = [self._residency.parked(model_id), self._residency.gone(model_id)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    def pin(self, name: str) -> None:
        """Never evict a model from now on.

        Raises:
            ModelNotFound: there is none.

        """
        self._scheduler.pin(self.config.find(name).id)

    def unpin(self, name: str) -> None:
        """Let a model be evicted when it is idle.

        Raises:
            ModelNotFound: there is none.

        """
        self._scheduler.unpin(self.config.find(name).id)

    async def _preload(self, model: ModelConfig) -> None:
        try:
            await self.load(model.id)
        except EngineError as error:
            log.error("cannot load the pinned model %s: %s", model.id, error)

    async def _restore(self) -> None:
        """Requests go first, and nothing leaves for it."""
        scheduling = SchedulingOptions(priority=Priority.BATCH, no_evict=True)
        for model_id in self._to_restore:
            try:
                await self.load(model_id, scheduling)
            except EngineError as error:  # or it is configured no more
                log.warning("%s is not restored: %s", model_id, error)

    async def _warn_of_too_large(self) -> None:
        """Name the models that every request for them will be refused for, before one comes.

        Only of those whose files are here: nothing is fetched or built for it.
        """
        for model in self.config.models:
            try:
                if not await asyncio.to_thread(_has_all_files, model, self.config):
                    continue
                await self._know_size(model, self.config.queue_timeout_s)
            except Exception as error:  # a library's; its first request will be told
                log.debug("cannot tell what %s takes: %s", model.id, error)
                continue
            forecast = self._scheduler.forecast(model.id)
            if not forecast.fits:
                needed = format_size(forecast.wanted_bytes or 0)
                log.warning("%s cannot be served: needs %s; %s", model.id, needed, forecast.reason)

    async def _watch_device(self) -> None:
        while True:
            await asyncio.sleep(EXTERNAL_CHECK_S)
            self._scheduler.on_timer()

    def _on_event(self, event: SchedulerEvent) -> None:
        self._metrics.count(event, self._clock())
        self.events.append(event)
        if event.kind in FAILURES:
            self._recheck.set()
        if event.kind is EventKind.UNLOADED and self._scheduler.empty:
            self._emptied.set()
        level = logging.DEBUG if event.kind is EventKind.GRANT else logging.INFO
        log.log(
            level,
            "%s %s%s (granted %d of %d bytes)",
            event.kind.value,
            event.model,
            f": {event.reason}" if event.reason else "",
            event.granted_bytes,
            event.capacity_bytes,
        )


def _has_all_files(model: ModelConfig, config: EngineConfig) -> bool:
    """Whether all that a model reads is on this disk. Asks no hub."""
    from engine.catalog.model_files import (
        files_of,  # it brings NumPy, which commands need not wait for
    )

    return all(files.present for files in files_of(model, config))
