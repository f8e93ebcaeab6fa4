"""The façade: everything a server needs of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from prometheus_client.registry import CollectorRegistry

from engine.activity import Activity
from engine.admission import Admission
from engine.catalog.fetcher import Fetcher
from engine.config import EngineConfig, ModelConfig
from engine.costs.accounts import Accounts
from engine.costs.budget import BudgetWarning
from engine.dispatch import Dispatch
from engine.errors import (
    ConfigError,
    Conflict,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.files.hub.fetch import FetchProgress
from engine.memory.device import CudaDevice, Device, host_memory_bytes, open_device
from engine.memory.host_memory import HostMemory
from engine.metrics import EngineMetrics
from engine.model_loras import ModelLoras
from engine.preloading import Preloading
from engine.process.faults import FAULTS
from engine.process.health import wait_for_fault
from engine.process.heap import freeze_heap, thaw_heap, uncollected
from engine.process.library_logs import quiet_libraries
from engine.process.torch_state import share_torch_state
from engine.requests import Priority, Request, SchedulingOptions
from engine.residency import Residency
from engine.routing.choice import Choice
from engine.routing.router import RequestT, Router, request_to, with_adapter
from engine.runtimes.base import Prepared, Runtime, RuntimeContext, Voice
from engine.runtimes.common.import_indexes import kept_indexes
from engine.runtimes.registry import options_of, runtime_class
from engine.scheduling.deadline import Deadline
from engine.scheduling.estimates import EstimateStore
from engine.scheduling.event_log import EventLog
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Ledger
from engine.scheduling.order import OrderKind, carried_out
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from engine.session import Session
from engine.status import (
    EngineState,
    EngineStatus,
    Forecast,
    ModelState,
    ModelStatus,
    ProviderStatus,
    Restarts,
)
from engine.tracing import Tracer

log = logging.getLogger(__name__)

_STAGES = {ModelState.LOADING: Stage.LOADING, ModelState.WAKING: Stage.WAKING}

FAILURES = frozenset({EventKind.LOAD_FAILED, EventKind.WAKE_FAILED, EventKind.MODEL_FAILED})
"""Events that a device which lost its state would cause."""

EXTERNAL_CHECK_S = 5.0
"""The interval between measurements of external bytes while nothing else happens."""


class Engine:
    """One device, one ledger, many models."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        device: Device | None = None,
        runtimes: Mapping[str, Callable[[RuntimeContext], Runtime]] | None = None,
        restarts: Restarts | None = None,
        restore: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Cheap: opens no device and imports no library before `start`.

        `device` replaces the configured one, and `runtimes` the classes in the registry.
        `restarts` is only reported. After the start the models of `restore` are brought in, in
        that order, as far as they fit.
        """
        self.config = config
        self._restarts = restarts or Restarts()
        self.state = EngineState.STARTING
        self._clock = clock
        self._device = device
        self._given_runtimes = dict(runtimes or {})
        self._runtimes: dict[str, Runtime] = {}
        self._models = {model.id: model for model in config.models}
        self.activity = Activity(clock)
        """When requests that are not of a batch came and ended."""
        self.tracer: Tracer | None = None
        """Told what happens to requests. Set before the start, if at all."""
        self.events = EventLog()
        """What the scheduler did; closed when the engine has drained."""
        self._emptied = asyncio.Event()
        self._ledger = Ledger(0, 0)
        self._metrics = EngineMetrics(self.status)
        self.accounts = Accounts(config, self._metrics.registry, on_warning=self._on_budget_warning)
        """What requests cost, and what they may."""
        self._fetcher = Fetcher(
            self._models, self._runtimes, config.cache_dir, self._on_files_changed
        )
        self._residency = Residency(
            self._models, self._runtimes, self._fetcher, clock, self._metrics.residual
        )
        self._scheduler = Scheduler(
            config,
            self._ledger,
            self._residency,
            clock,
            on_event=self._on_event,
            on_empty=self._emptied.set,
            created=int(time.time()),
        )
        self._residency.outcomes = self._scheduler
        self.loras = ModelLoras(
            self._runtimes, self._given_runtimes, self._residency, self._scheduler
        )
        """The LoRAs of the models."""
        config.know_adapters(self.loras.adapters)
        self._admission = Admission(
            self._runtimes,
            self._residency,
            self._scheduler,
            self._fetcher,
            clock,
            self._metrics.request_seconds,
        )
        self.router = Router(config, self._prepare, self._outlook, self.accounts.price)
        self._dispatch = Dispatch(
            config, self.router, self._admission, self.accounts, self._scheduler.report, clock
        )
        self._started = asyncio.Event()
        self._start_error: str | None = None
        self._recheck = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._preloading = Preloading(
            config,
            self._runtimes,
            self._admission,
            self._scheduler.report,
            self.load,
            self._usual_deadline,
            restore,
        )

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
                await self.accounts.start()
                device, host, budget_bytes = await asyncio.to_thread(self._open)
                freeze_heap()  # otherwise collections in a warm-up scan all that is imported
                for name, runtime in self._runtimes.items():
                    began_s = time.perf_counter()
                    await runtime.warm_up()
                    log.info("%s is warm after %.1f s", name, time.perf_counter() - began_s)
        except Exception as error:
            thaw_heap()
            self._start_error = str(error) or type(error).__name__
            self.state = EngineState.STOPPED
            self._started.set()
            raise
        freeze_heap()
        device.set_baseline()
        self._device = device
        estimates = EstimateStore(self.config.state_dir, device.name, options_of)
        self._admission.estimates = estimates
        self._residency.open(device, estimates, host)
        self._ledger.set_device(budget_bytes, device.total_bytes)
        self._scheduler.on_timer()
        await self._preloading.bring_in_what_takes_no_device()
        self._started.set()
        if self.state is not EngineState.STARTING:  # `drain` was called during the start
            return
        self.state = EngineState.READY
        self._watch = asyncio.create_task(self._watch_device())
        self._preloading.start()

    def _open(self) -> tuple[Device, HostMemory, int]:
        """Open the device and start the runtimes; the device, host memory and device budget."""
        quiet_libraries()
        device = self._device or open_device(self.config.device)
        host_budget = self.config.host_memory_budget(device.kind)
        host_bytes = host_budget.budget_bytes(host_memory_bytes())
        host = HostMemory(host_bytes, pinned=device.kind == CudaDevice.kind)
        budget = self.config.memory_budget(device.kind)
        budget_bytes = budget.budget_bytes(device.total_bytes)
        context = RuntimeContext(
            device, self.config.cache_dir, host, budget_bytes, tracer=self.tracer
        )
        for model in self.config.models:
            if model.runtime not in self._runtimes:
                make = self._given_runtimes.get(model.runtime) or runtime_class(model.runtime)
                self._runtimes[model.runtime] = make(context)
            options_of(model)  # a configuration made in code may not have been checked
        with kept_indexes(self.config.cache_dir):
            for name, runtime in self._runtimes.items():
                began_s = time.perf_counter()
                try:
                    runtime.start()
                except ImportError as error:
                    message = f"models: the runtime {name!r} cannot start: {error}"
                    raise ConfigError(message) from error
                log.info("%s is imported after %.1f s", name, time.perf_counter() - began_s)
        if "torch" in sys.modules:
            share_torch_state()
        return device, host, budget_bytes

    async def drain(self, limit_s: float) -> None:
        """Refuse new work and wait for what runs, `limit_s` seconds at most."""
        self.state = EngineState.DRAINING
        self._started.set()  # who waits for the start is refused now
        self._preloading.stop()
        self._fetcher.stop()  # what waits for files would be refused when they are here
        self._scheduler.on_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._emptied.wait()
        self.events.close()  # otherwise a client that follows the log would hold the server up

    async def stop(self) -> None:
        """Unload everything and stop the libraries. Requests that still run are cut off."""
        if self.state is not EngineState.DRAINING:
            await self.drain(0.0)
        if self._watch is not None:
            self._watch.cancel()
        await self._residency.stop()
        for runtime in self._runtimes.values():
            await runtime.stop()
        await self.accounts.stop()
        thaw_heap()
        self.state = EngineState.STOPPED

    async def wait_for_fault(self, hang_s: float, stall_s: float) -> str:
        """Wait for a fault that needs a new process, and return its reason in words.

        See `engine.process.health.wait_for_fault`. Call it once the engine has started.
        """
        assert self._device is not None
        return await wait_for_fault(self._device, self._recheck, hang_s, stall_s)

    def wanted(self) -> tuple[str, ...]:
        """The models that are there or being brought in, by demand, highest first."""
        return self._scheduler.report.wanted()

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
        request = with_adapter(self.config, request)
        model = self.config.find(request.model)
        if self.state is EngineState.STARTING or model.runtime not in self._runtimes:
            raise QueueTimeout("The engine is still starting.", retry_after_s=5.0)
        return self._prepare(model, request)

    async def check(self, request: Request) -> None:
        """Return if a request passes every check without a loaded model. Waits for the start.

        Raises:
            EngineError: see `prepare`.

        """
        await self._wait_started(self._usual_deadline())
        self.prepare(request)

    def _prepare(self, model: ModelConfig, request: Request) -> Prepared:
        return self._runtimes[model.runtime].prepare(model, request)

    def _outlook(self, model: ModelConfig, request: Request, working_bytes: int) -> Forecast:
        return self._scheduler.report.forecast(
            model.id, working_bytes=working_bytes, priority=request.scheduling.priority
        )

    async def build_files(self, name: str) -> None:
        """Build the files of a model that this machine builds itself; fetch nothing from a hub.

        They say what the model can do, so that a request for it can be checked.

        Raises:
            ModelNotFound: there is no such model.
            QueueTimeout: building takes too long. It goes on.
            ShuttingDown: the engine stops.

        """
        await self._admission.build_files(self.config.find(name), self._usual_deadline())

    async def open(self, request: Request, waiting: Waiting | None = None) -> Session:
        """Admit a request, load its model if need be, and wait for its first event.

        `waiting` shows where the request stands during the call: see `wait_status`.

        Raises:
            EngineError: whatever can go wrong before the first byte.

        """
        trace = None if self.tracer is None else self.tracer.request(request)
        is_batch = request.scheduling.priority is Priority.BATCH
        if not is_batch:
            self.activity.begin()
        try:
            self._dispatch.check_name(request.model)
            deadline = self._deadline_of(request.scheduling)
            await self._wait_started(deadline)
            session = await self._dispatch.open(request, deadline, waiting or Waiting())
        except BaseException as error:
            if not is_batch:
                self.activity.end("")
            if trace is not None:
                trace.failed(error)
            raise
        if not is_batch:
            session.on_closed = self.activity.end
        if trace is not None:
            session.trace_by(trace)
        return session

    async def check_loaded(self, name: str) -> None:
        """Return if a model is there, or is being brought in for others.

        Raises:
            ModelNotFound: there is no such model.
            NotLoaded: it is not; the error has the cost of bringing it in.

        """
        await self._admission.check_loaded(self.config.find(name))

    async def hold(
        self,
        names: Sequence[str],
        *,
        request_id: str,
        scheduling: SchedulingOptions | None = None,
        waiting: Waiting | None = None,
    ) -> Lease:
        """Keep several models on the device for a session, all or none. Release the lease to end.

        Each run of the session is a request of its own. `names` are distinct, and one at least.

        Raises:
            ModelNotFound: there is no such model.
            InsufficientCapacity: together they never fit.
            Overloaded: sessions, or requests that run, leave no room for them.
            EngineError: one of them cannot be loaded.

        """
        models = self._distinct(names)
        scheduling = scheduling or SchedulingOptions()
        deadline = self._deadline_of(scheduling)
        await self._wait_started(deadline)
        if scheduling.if_loaded_only:
            for model in models:
                await self._admission.check_loaded(model)
        for model in models:
            await self._admission.bring_files(model, deadline)
            await self._admission.know_size(model, deadline)
        return await self._admission.lease(
            models[0],
            request_id=request_id,
            operation="session",
            scheduling=scheduling,
            deadline=deadline,
            waiting=waiting or Waiting(),
            hold=True,
            further_models=tuple(model.id for model in models[1:]),
        )

    async def plan(
        self,
        name: str,
        *,
        further_models: Sequence[str] = (),
        working_bytes: int = 0,
        priority: Priority = Priority.NORMAL,
    ) -> Forecast:
        """What would be done for a request that came now. Changes nothing.

        `working_bytes` is the device memory that the run would need beside the model. With
        `further_models` it is for a session that keeps all of these models: see `hold`.

        Raises:
            ModelNotFound: there is no such model.
            LoadFailed: its files are missing or unreadable.
            QueueTimeout: the engine is still starting, or the files still being fetched.

        """
        models = self._distinct((name, *further_models))
        deadline = self._usual_deadline()
        await self._wait_started(deadline)
        for model in models:
            await self._admission.know_size(model, deadline)
        return self._scheduler.report.forecast(
            models[0].id,
            further_models=tuple(model.id for model in models[1:]),
            working_bytes=working_bytes,
            priority=priority,
        )

    def _distinct(self, names: Sequence[str]) -> list[ModelConfig]:
        found = (self.config.find(name) for name in names)
        return list({model.id: model for model in found}.values())

    async def route(self, request: Request) -> Choice:
        """Which models would serve a request that came now, and why. Runs nothing.

        Raises:
            ModelNotFound: no model and no route has that name.
            InvalidRequest: the caller's key may not use the route.

        """
        self._dispatch.check_name(request.model)
        deadline = self._usual_deadline()
        await self._wait_started(deadline)
        return await self._dispatch.choose(request, deadline)

    async def resolve(self, request: RequestT) -> RequestT:
        """The request, addressed to the model that would serve it now.

        Raises:
            EngineError: see `route`; or no model of the route can do it.

        """
        if request.model not in self.router:
            request = with_adapter(self.config, request)
            return request_to(self.config.find(request.model), request)
        choice = await self.route(request)
        if not choice.models:
            raise choice.refusal()
        return request_to(self.config.find(choice.models[0]), request)

    def _deadline_of(self, scheduling: SchedulingOptions) -> Deadline:
        timeout_s = scheduling.timeout_s
        return Deadline(
            self._clock, self.config.queue_timeout_s if timeout_s is None else timeout_s
        )

    def _usual_deadline(self) -> Deadline:
        return Deadline(self._clock, self.config.queue_timeout_s)

    async def _wait_started(self, deadline: Deadline) -> None:
        try:
            async with asyncio.timeout(deadline.left_s):
                await self._started.wait()
        except TimeoutError:
            raise QueueTimeout("The engine is still starting.", retry_after_s=5.0) from None
        if self._start_error is not None:
            raise RuntimeFailed(f"The engine could not start: {self._start_error}")
        if self.state in (EngineState.DRAINING, EngineState.STOPPED):
            raise ShuttingDown("The engine is shutting down.", retry_after_s=5.0)

    def wait_status(self, waiting: Waiting) -> WaitStatus:
        """Where a request stands on its way through `open`, at this moment."""
        if waiting.ticket is None:
            return WaitStatus(waiting.stage)
        ticket = self._scheduler.report.ticket_status(waiting.ticket)
        if ticket is None:  # granted or refused; `open` goes on in a moment
            return WaitStatus(Stage.RUNNING)
        state = self.model_status(waiting.ticket.model_id).state
        stage = _STAGES.get(state, Stage.QUEUED)
        return WaitStatus(stage, ticket.position, ticket.eta_s)

    async def voices(self, name: str, *, fetch: bool = True) -> tuple[Voice, ...]:
        """The voices of a model; none if it does not speak. Its files are fetched if need be.

        Without `fetch` a model has no voices while its files are not here.

        Raises:
            ModelNotFound: there is no such model.
            LoadFailed: its files are not to be had, or unreadable.
            QueueTimeout: the engine is still starting, or the files still being fetched.

        """
        model = self.config.find(name)
        deadline = self._usual_deadline()
        await self._wait_started(deadline)
        if not fetch and not await self._fetcher.look(model):
            return ()
        await self._fetcher.bring(model, deadline)
        return await asyncio.to_thread(self._runtimes[model.runtime].voices, model)

    def status(self) -> EngineStatus:
        """Everything, at this moment."""
        return EngineStatus(
            state=self.state,
            device_kind=self._device.kind if self._device else self.config.device,
            device_name=self._device.name if self._device else "",
            ledger=self._ledger.status(),
            host=self._residency.host_status(),
            models=self._scheduler.report.models(),
            queue=self._scheduler.report.queue(),
            transition=self._scheduler.transition,
            restarts=self._restarts,
        )

    def providers(self) -> tuple[ProviderStatus, ...]:
        """The providers of remote models, at this moment."""
        return tuple(each for runtime in self._runtimes.values() for each in runtime.providers())

    def model_status(self, name: str) -> ModelStatus:
        """One model, by id or alias.

        Raises:
            ModelNotFound: there is none.

        """
        return self._scheduler.report.model(self.config.find(name).id)

    async def load(self, name: str, scheduling: SchedulingOptions | None = None) -> None:
        """Bring a model in as if a request had asked for it, and return once it is ready.

        Raises:
            EngineError: it does not exist, does not fit, or cannot be loaded.

        """
        model = self.config.find(name)
        deadline = self._usual_deadline()
        await self._wait_started(deadline)
        await self._admission.bring_files(model, deadline)
        await self._admission.bring_in(model, deadline, scheduling or SchedulingOptions())

    async def unload(self, name: str) -> None:
        """Take an idle model out, and return once its bytes are free.

        Raises:
            ModelNotFound: there is none.
            Conflict: it is in use, waited for, pinned, or being loaded.
            QueueTimeout: other models were moved for that long.

        """
        await self._order(OrderKind.UNLOAD, name)

    async def park(self, name: str) -> None:
        """Take an idle model off the device, and return once its bytes are free.

        It stays loaded, and comes back from its host copy. One that is off the device stays as
        it is.

        Raises:
            ModelNotFound: there is none.
            Conflict: it is in use, waited for, pinned, being moved, or cannot be parked.
            QueueTimeout: other models were moved for that long, or requests for it came.

        """
        await self._order(OrderKind.PARK, name)

    async def _order(self, kind: OrderKind, name: str) -> None:
        model = self.config.find(name)
        await carried_out(self._scheduler, kind, model.id, self.config.queue_timeout_s)

    def inputs(self, name: str) -> frozenset[str] | None:
        """What a request to a model or route may hold: `text`, `image`, `audio`, `video`.

        None: nobody knows, as before the start. A route takes what one of its models takes.
        """
        if name in self.router:
            found = [self.inputs(model.id) for model in self.router.models(name)]
            known = [each for each in found if each is not None]
            return frozenset().union(*known) if known and len(known) == len(found) else None
        model, _ = self.config.find_adapter(name)
        runtime = self._runtimes.get(model.runtime)
        return None if runtime is None else runtime.inputs(model)

    async def pull(self, name: str, every_s: float) -> AsyncGenerator[FetchProgress, None]:
        """Fetch the newest files of a model; yields the progress, the last time at the end.

        A loaded model keeps its old files until it is unloaded (`ModelStatus.outdated`).

        Raises:
            ModelNotFound: there is no such model.
            NotFound: there is no such repository or revision.
            LoadFailed: they are not to be had.
            Overloaded: the engine is still starting or shuts down.

        """
        model = self.config.find(name)
        await self._wait_started(self._usual_deadline())
        async with contextlib.aclosing(self._fetcher.follow(model, every_s)) as progress:
            async for each in progress:
                yield each

    async def remove_files(self, name: str, delete: Callable[[], int]) -> int:
        """Delete the files of a model by `delete`, on a thread; returns the freed bytes.

        Raises:
            ModelNotFound: there is no such model.
            Conflict: it is loaded or waited for, or its files are just being fetched.
            Exception: what `delete` raised.

        """
        status = self.model_status(name)
        if status.state is not ModelState.ABSENT:
            raise Conflict(f"The model {status.id!r} is loaded; unload it first.")
        if status.waiting:
            raise Conflict(f"Requests wait for the model {status.id!r}.")
        return await self._fetcher.remove(self.config.find(name), delete)

    def _on_files_changed(self, model: ModelConfig) -> None:
        log.info("%s: newer files are here", model.id)
        if self._admission.estimates is not None:
            self._admission.estimates.forget(model)
        self._scheduler.on_files_changed(model.id)

    def pin(self, name: str) -> None:
        """Never evict a model from now on.

        Raises:
            ModelNotFound: there is none.

        """
        self._scheduler.pin(self.config.find(name).id)

    def unpin(self, name: str) -> None:
        """Allow evictions of a model while it is idle.

        Raises:
            ModelNotFound: there is none.

        """
        self._scheduler.unpin(self.config.find(name).id)

    async def _watch_device(self) -> None:
        while True:
            await asyncio.sleep(EXTERNAL_CHECK_S)
            try:
                self._scheduler.on_timer()
            except Exception as error:
                FAULTS.report("the watch of the device", error)
                return

    def _on_budget_warning(self, warning: BudgetWarning) -> None:
        ledger = self._ledger.status()
        self.events.append(
            SchedulerEvent(
                EventKind.BUDGET, "", warning.text, ledger.granted_bytes, ledger.capacity_bytes
            )
        )

    def _on_event(self, event: SchedulerEvent) -> None:
        self._metrics.count(event, self._clock())
        self.events.append(event)
        if self.tracer is not None:
            self.tracer.moved(event.kind.value, event.model)
        if event.kind in FAILURES:
            self._recheck.set()
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
