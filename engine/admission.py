"""How a request gets in: its files, its lease, its first event, and a second try alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping

from prometheus_client import Histogram

from engine.catalog.fetcher import Fetcher
from engine.config import ModelConfig
from engine.costs.counted import count_event
from engine.costs.device_time import DeviceTime
from engine.costs.provider import LOCAL, provider_of
from engine.errors import (
    Conflict,
    EngineError,
    LoadFailed,
    NotLoaded,
    OutOfDeviceMemory,
    RuntimeFailed,
)
from engine.events import Cut, Document, Event, WorkingMemory
from engine.requests import Request, SchedulingOptions, TextRequest, adapters_of
from engine.residency import Residency
from engine.runtimes.base import Prepared, Runtime
from engine.scheduling.deadline import Deadline
from engine.scheduling.estimates import EstimateStore
from engine.scheduling.lease import Lease
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.ticket import Ticket
from engine.scheduling.waiting import Stage, Waiting
from engine.session import Notes, Session, Timings
from engine.status import COMPLETE
from engine.usage import Usage

log = logging.getLogger(__name__)

SIZE_TIMEOUT_S = 1.0
"""How long a refusal may wait for the sizes that it reports."""

WORKING_MARGIN = 0.05
"""The share above the last measured peak that a run is granted: allocators differ between runs."""

OUT_OF_MEMORY_FACTOR = 1.5
"""By how much the grant of a shape grows after it ran out of device memory."""


class Admission:
    """Turns requests into sessions. Belongs to one engine and lives on its event loop."""

    def __init__(
        self,
        runtimes: Mapping[str, Runtime],
        residency: Residency,
        scheduler: Scheduler,
        fetcher: Fetcher,
        clock: Callable[[], float],
        request_seconds: Histogram,
    ) -> None:
        """`request_seconds` has the labels model and phase (`queue`, `load`, `run`)."""
        self.estimates: EstimateStore | None = None
        """What was measured before. Set once, when the device is open."""
        self._runtimes = runtimes
        self._residency = residency
        self._scheduler = scheduler
        self._fetcher = fetcher
        self._clock = clock
        self._request_seconds = request_seconds
        self._device_time = DeviceTime(clock)

    async def open(
        self, model: ModelConfig, request: Request, deadline: Deadline, waiting: Waiting
    ) -> Session:
        """Bring the request's model in if need be, and wait for the first event.

        `waiting` is kept up to date during the call. `deadline` bounds all waits together: for the
        files, for the grant, and for the grant of a second try.

        Raises:
            EngineError: whatever can go wrong before the first byte.

        """
        opened_at = self._clock()
        runtime = self._runtimes[model.runtime]
        prepared = runtime.prepare(model, request)
        waiting.usage = prepared.usage
        waiting.stage = Stage.FETCHING
        if request.scheduling.if_loaded_only:
            await self.check_loaded(model)
        if not self._fetcher.has_files(model):
            await self.bring_files(model, deadline)
            # Only now do the files say what a run takes, and what it cannot do.
            prepared = runtime.prepare(model, request)
            waiting.usage = prepared.usage

        async def alone(error: EngineError) -> Session:
            if not isinstance(error, OutOfDeviceMemory):
                raise error
            log.warning("%s: %s; trying once more, alone", request.request_id, error)
            deadline.go_on()
            return await self._attempt(
                model, prepared, deadline, waiting, exclusive=True, since=self._clock()
            )

        try:
            session = await self._attempt(
                model, prepared, deadline, waiting, exclusive=False, since=opened_at
            )
        except OutOfDeviceMemory as error:
            return await alone(error)
        session.again = alone
        return session

    async def check_loaded(self, model: ModelConfig) -> None:
        """Return if the model is there, or is being brought in for others.

        Raises:
            NotLoaded: it is not; the error has the cost of bringing it in.

        """
        if self._scheduler.report.model(model.id).state not in COMPLETE:
            raise await self._not_loaded(model)

    async def bring_files(self, model: ModelConfig, deadline: Deadline) -> None:
        """Wait until the model's files are here. If they are not to be had, its load will say so.

        Raises:
            QueueTimeout: they take longer to come. Fetching them goes on.
            ShuttingDown: the engine stops.

        """
        with contextlib.suppress(LoadFailed):
            await self._fetcher.bring(model, deadline)

    async def build_files(self, model: ModelConfig, deadline: Deadline) -> None:
        """Wait until the model's files are here, if this machine builds all of them itself.

        Raises:
            EngineError: see `bring_files`.

        """
        if self._fetcher.only_builds(model):
            await self.bring_files(model, deadline)

    async def know_size(self, model: ModelConfig, deadline: Deadline) -> None:
        """Give the scheduler the model's estimate, if it has none yet.

        Raises:
            LoadFailed: the model's files are missing or unreadable.
            QueueTimeout: they take longer to come. Fetching them goes on.

        """
        if self._scheduler.report.model(model.id).estimated_bytes is not None:
            return
        estimate = self.estimates.get(model) if self.estimates is not None else None
        if estimate is None:
            estimate = await self._fetcher.estimate(model, deadline)
        self._scheduler.on_estimate(model.id, estimate)

    async def learn_size(self, model: ModelConfig, deadline: Deadline) -> None:
        """The same if the model's files are here. Nothing is fetched, and no failure is told."""
        known = self._scheduler.report.model(model.id).estimated_bytes is not None
        with contextlib.suppress(EngineError):
            if not known and await self._fetcher.look(model):
                await self.know_size(model, deadline)

    def working_bytes(self, model: ModelConfig, prepared: Prepared) -> int:
        """The measured peak of the last run of that shape and a margin, otherwise the estimate."""
        measured = None
        if prepared.shape and self.estimates is not None:
            measured = self.estimates.working_bytes(model, prepared.shape)
        if measured is None:
            return prepared.working_bytes
        return int(measured * (1 + WORKING_MARGIN))

    async def lease(
        self,
        model: ModelConfig,
        *,
        request_id: str,
        operation: str,
        working_bytes: int = 0,
        adapters: tuple[str, ...] = (),
        scheduling: SchedulingOptions,
        deadline: Deadline,
        waiting: Waiting,
        exclusive: bool = False,
        ignore_backoff: bool = False,
        hold: bool = False,
        further_models: tuple[str, ...] = (),
    ) -> Lease:
        """Queue a ticket and wait for its grant; the model is there then.

        A `hold` keeps the model and `further_models` for a session: see `Ticket`. `waiting` is kept
        up to date during the call. With `ignore_backoff` a model that lately failed to load is
        tried at once.

        Raises:
            EngineError: the ticket was refused.

        """
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
            adapters=adapters,
            priority=scheduling.priority,
            timeout_s=deadline.left_s,
            waited_s=deadline.waited_s,
            exclusive=exclusive,
            keep_alive_s=scheduling.keep_alive_s,
            if_loaded_only=scheduling.if_loaded_only,
            no_evict=scheduling.no_evict,
            hold=hold,
            further_models=further_models,
            on_granted=on_granted,
            on_refused=on_refused,
        )
        try:
            self._scheduler.on_request(ticket, ignore_backoff=ignore_backoff)
            waiting.stage, waiting.ticket = Stage.QUEUED, ticket
            lease = await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()  # granted in the very moment the caller left
            self._scheduler.on_cancel(ticket)
            raise
        except Conflict:  # only `if_loaded_only` is refused so; the caller gets the cost as well
            raise await self._not_loaded(model) from None
        finally:
            granted.cancel()  # nobody waits any more, even if a bug ended the call
        deadline.stop()
        waiting.stage, waiting.ticket = Stage.RUNNING, None
        return lease

    async def bring_in(
        self, model: ModelConfig, deadline: Deadline, scheduling: SchedulingOptions
    ) -> None:
        """Load a model whose files are here as if a request had asked for it.

        Raises:
            EngineError: it does not fit, or cannot be loaded.

        """
        lease = await self.lease(
            model,
            request_id=f"load-{model.id}",
            operation="load",
            scheduling=scheduling,
            deadline=deadline,
            waiting=Waiting(),
            ignore_backoff=True,
        )
        lease.release()

    async def _not_loaded(self, model: ModelConfig) -> NotLoaded:
        # Reading the sizes takes moments where the files are here; otherwise they stay unknown.
        with contextlib.suppress(EngineError):
            await self.know_size(model, Deadline(self._clock, SIZE_TIMEOUT_S))
        forecast = self._scheduler.report.forecast(model.id)
        return NotLoaded(
            f"The model {model.id!r} is not loaded, and the request is for a loaded one only.",
            tier=forecast.tier,
            load_s=forecast.move_s,
            evicts=tuple(eviction.model for eviction in forecast.evictions),
        )

    async def _attempt(
        self,
        model: ModelConfig,
        prepared: Prepared,
        deadline: Deadline,
        waiting: Waiting,
        *,
        exclusive: bool,
        since: float,
    ) -> Session:
        request = prepared.request
        lease = await self.lease(
            model,
            request_id=request.request_id,
            operation=request.operation.value,
            working_bytes=self.working_bytes(model, prepared),
            adapters=adapters_of(request),
            scheduling=request.scheduling,
            deadline=deadline,
            exclusive=exclusive,
            waiting=waiting,
        )
        granted_at = self._clock()
        if provider_of(model) == LOCAL:
            self._count_device_time(lease, prepared.usage)
        notes = Notes()
        events = self._residency.loaded[model.id].run(prepared)
        if not isinstance(request, TextRequest):  # it has no notes, and many events
            events = self._noted(model, prepared, events, notes)
        try:
            try:
                first = await anext(events)
            except StopAsyncIteration:
                raise RuntimeFailed("The model gave no answer.") from None
            if isinstance(first, Document):
                await events.aclose()
        except BaseException:
            try:
                await events.aclose()
            finally:
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
            self._request_seconds.labels(model.id, phase).observe(seconds)
        timings = Timings(
            queue_ms=queue_s * 1e3,
            load_ms=lease.timings.load_s * 1e3,
            run_ms=run_s * 1e3,
            tier=lease.timings.tier,
            fetch_ms=max(0.0, granted_at - since - lease.timings.queued_s) * 1e3,
        )
        session = Session(model, first, events, lease, timings, notes, prepared.usage)
        session.caller = request.scheduling.caller
        return session

    def _count_device_time(self, lease: Lease, usage: Usage) -> None:
        """Add the device's seconds to the usage when the lease ends."""
        share = self._device_time.begin()

        def on_release() -> None:
            usage.device_s += share.end()

        lease.on_release = on_release

    async def _noted(
        self,
        model: ModelConfig,
        prepared: Prepared,
        events: AsyncGenerator[Event, None],
        notes: Notes,
    ) -> AsyncGenerator[Event, None]:
        """The events of a run without its notes. The next run is granted the measured peak."""
        assert self.estimates is not None  # a run needs a loaded model, a load the estimates
        remember = self.estimates.put_working_bytes
        async with contextlib.aclosing(events):
            try:
                async for event in events:
                    count_event(prepared.usage, prepared.request, event)
                    if isinstance(event, Cut):
                        notes.cuts.append(event)
                    elif isinstance(event, WorkingMemory):
                        notes.peak_bytes = event.nbytes
                        await asyncio.to_thread(remember, model, prepared.shape, event.nbytes)
                    else:
                        yield event
            except OutOfDeviceMemory:
                if not prepared.shape:
                    raise
                granted = self.working_bytes(model, prepared)
                more = int(granted * OUT_OF_MEMORY_FACTOR)
                await asyncio.to_thread(remember, model, prepared.shape, more)
                raise
