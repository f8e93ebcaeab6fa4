"""Jobs: video requests that outlive their connection, and the process.

A job is committed to disk before it is acknowledged. A kill at any moment leaves one of two
things. An unfinished job is put back in the queue by the next start. A completed job has whole
files: they are written under other names, synced and renamed before the job is completed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL.Image import Image

from engine.engine import Engine
from engine.errors import (
    BudgetExceeded,
    BudgetReserved,
    Conflict,
    EngineError,
    InvalidRequest,
    LoadFailed,
    NoSpaceLeft,
    NotFound,
    OutOfDeviceMemory,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import Cut, VideoResult
from engine.jobs.first_frame import first_frame_request
from engine.jobs.input_images import InputImages
from engine.jobs.queue_place import QueuePlace, queue_place
from engine.jobs.records import JobRecords
from engine.jobs.request_codec import from_json, left_s, to_json
from engine.jobs.store import Job, JobError, JobState, JobStore
from engine.jobs.video import SUFFIXES, VideoMaker, save_video
from engine.media.outputs import Outputs
from engine.requests import Request, VideoRequest
from engine.status import EngineState

log = logging.getLogger(__name__)

FOLDER = "jobs"
"""Under `data_dir`. It has a folder for each unfinished job that came with an image."""

PROGRESS_EVERY_S = 1.0
"""The shortest interval between writes of a job's progress to disk."""

PRUNE_EVERY_S = 600.0
"""The interval between checks of the age of outputs."""

BACKOFF_S = 1.0
"""The wait before the second attempt; each later wait is four times as long."""

MAX_ATTEMPTS = 3

RETRIED = (OutOfDeviceMemory, RuntimeFailed, LoadFailed)
"""Errors that another attempt may cure. After `Overloaded` no attempt counts: none began."""

Sleep = Callable[[float], Awaitable[None]]
T = TypeVar("T")


@dataclass(slots=True)
class _Run:
    """The current attempt of a job."""

    task: asyncio.Task[None]
    interruptible: bool = True
    """False once the frames are there: writing them takes seconds, making them again minutes."""
    interrupted: bool = False
    written_at: float = -math.inf
    """When the progress was last written to disk."""
    run_s: float = 0.0
    cuts: Sequence[Cut] = ()


class Jobs:
    """Every video job: the queue, the attempts, the records. Lives on one event loop."""

    def __init__(
        self,
        engine: Engine,
        outputs: Outputs,
        *,
        max_running: int = 2,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """Touches no disk.

        At most `max_running` jobs at a time are handed to the engine, whose scheduler orders
        them. `clock` gives Unix seconds; `sleep` waits between attempts.
        """
        self._engine = engine
        self._outputs = outputs
        self._max_running = max_running
        self._max_attempts = max_attempts
        self._clock = clock
        self._sleep = sleep
        self._images = InputImages(engine.config.data_dir / FOLDER)
        self._records = JobRecords()
        self._changing = asyncio.Lock()
        """Held by `start` and `stop`."""
        self._serving = False
        """True from the end of `start` to the beginning of `stop`."""
        self._live: dict[str, Job] = {}
        """The jobs that have not ended, oldest first. These are newer than their records."""
        self._unrecorded: dict[str, Job] = {}
        """Jobs that have ended, but the disk could not take their last record yet."""
        self._runs: dict[str, _Run] = {}
        self._delays: dict[str, asyncio.Task[None]] = {}
        """Of queued jobs that wait for the time of their next attempt."""
        self._suspects: set[str] = set()
        """Jobs that ran when the process died. Each runs alone: a job that kills the process every
        time must use up its own attempts, and not those of a job beside it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pruning: asyncio.Task[None] | None = None
        self._one_ended = asyncio.Event()
        """Set and replaced whenever a job has ended."""

    async def start(self) -> None:
        """Open the records and put unfinished jobs back in the queue.

        Call it once the engine has started. Otherwise a process that is killed during the start
        counts as an attempt of the jobs that wait for it.

        Raises:
            ConfigError: the records cannot be used; they are left as they are.

        """
        async with self._changing:
            try:
                await self._records.open(self._engine.config.data_dir)
                store = self._records.store
                for job in await self._records.write(store.unfinished):
                    await self._take_up(store, job)
                await asyncio.to_thread(self._images.open, self._live.keys())
            except BaseException:
                await self._close()
                raise
            self._serving = True
            self._outputs.on_removed = self._on_removed
            self._pruning = asyncio.create_task(self._keep_pruning())
            if self._live:
                log.info("%d unfinished jobs go on", len(self._live))
            self._dispatch()

    async def _take_up(self, store: JobStore, job: Job) -> None:
        """Queue a job that an earlier process left unfinished."""
        if job.state is not JobState.IN_PROGRESS:
            self._live[job.id] = job
        elif job.attempts < self._max_attempts:
            self._suspects.add(job.id)
            self._live[job.id] = _queued(job)
            await self._records.write(store.update, self._live[job.id])
        else:
            message = f"The process ended {job.attempts} times while this job ran."
            await self._end(job, JobState.FAILED, JobError(RuntimeFailed.code, message))

    async def stop(self) -> None:
        """Interrupt all runs. Unfinished jobs stay for the next start, and lose no attempt.

        Call it before the engine drains: that would wait for the jobs. A video of which the
        frames are there is still written; that takes seconds.
        """
        async with self._changing:
            if not self._records.opened:
                return
            store = self._records.store
            self._serving = False
            for delay in self._delays.values():
                delay.cancel()
            self._delays.clear()
            if self._pruning is not None:
                self._pruning.cancel()
            await asyncio.gather(*(self._interrupt(run) for run in list(self._runs.values())))
            while self._tasks:
                await asyncio.wait(self._tasks)
            for job in list(self._live.values()):
                if job.state is JobState.IN_PROGRESS:
                    await self._records.write(store.update, _queued(job, attempts=job.attempts - 1))
            try:
                await self._record_ends()
            except Exception:
                log.exception("ends of jobs are not recorded; these jobs run again")
            await self._close()

    async def _close(self) -> None:
        await self._records.close()
        self._live.clear()
        self._unrecorded.clear()
        self._suspects.clear()
        self._wake_waiters()

    async def submit(self, request: VideoRequest) -> Job:
        """Check a request and queue it. The job is on disk when this returns.

        `request_id` is not used. Without a timeout a job waits as long as it must. With one it
        fails if it has no grant within that time of its creation.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: naming the field at fault.
            NotLoaded: the scheduling options ask for a loaded model, and it is not loaded.
            Overloaded: too many jobs wait, or the engine starts or shuts down.

        """
        store = self._records.store
        if self._closing:
            raise ShuttingDown("No new jobs are taken at this moment.", retry_after_s=5.0)
        if len(self._live) >= self._engine.config.max_queue:
            raise QueueFull(
                f"{len(self._live)} jobs are unfinished, the engine's bound.", retry_after_s=60.0
            )
        job_id = f"video_{uuid.uuid4().hex}"
        request = replace(await self._engine.resolve(request), request_id=job_id)
        if self._engine.tracer is not None:
            self._engine.tracer.submitted(job_id)
        model = self._engine.config.find(request.model)
        request = replace(request, model=model.id)
        prepared = await self._check(request)
        if request.scheduling.if_loaded_only:
            await self._engine.check_loaded(model.id)
        if not isinstance(prepared, VideoRequest):
            raise InvalidRequest(f"{model.id!r} makes no videos.", param="model")
        if prepared.seed is None:  # every attempt must make the same video
            prepared = replace(prepared, seed=secrets.randbelow(2**32))
        first_frame = first_frame_request(model, prepared)
        if first_frame is not None:
            await self._check(first_frame)
        job = Job(
            id=job_id,
            model=model.id,
            request=to_json(prepared),
            priority=prepared.scheduling.priority,
            state=JobState.QUEUED,
            progress=0.0,
            created_at=int(self._clock()),
        )
        return await self._uninterrupted(self._insert(store, job, prepared.image))

    async def _check(self, request: Request) -> Request:
        """The request with its defaults, checked by the model's files where they can be here."""
        self._engine.prepare(request)
        await self._engine.build_files(request.model)
        return self._engine.prepare(request).request

    def get(self, job_id: str) -> Job:
        """One job, as it is at this moment.

        Raises:
            NotFound: there is none.

        """
        store = self._records.store
        return self._live.get(job_id) or self._unrecorded.get(job_id) or store.get(job_id)

    async def ended(self, job_id: str) -> Job:
        """Wait until the job has ended and its record says so on disk.

        Raises:
            NotFound: there is none, or it was deleted during the wait.
            Overloaded: the jobs were stopped during the wait.

        """
        while job_id in self._live:
            await self._one_ended.wait()
        return self.get(job_id)

    def list(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs by age, and whether there are more; `after` is the id before them.

        Raises:
            NotFound: there is no job `after`.

        """
        jobs, has_more = self._records.store.list(limit=limit, after=after, order=order)
        newer = self._unrecorded | self._live
        return [newer.get(job.id, job) for job in jobs], has_more

    def place(self, job_id: str) -> QueuePlace | None:
        """Where a job stands in the queue; None when it is not queued.

        Raises:
            NotFound: there is none.

        """
        job = self.get(job_id)
        if job.state is not JobState.QUEUED:
            return None
        queued = [each for each in self._live.values() if each.state is JobState.QUEUED]
        running = [self._live[each] for each in self._runs if each in self._live]
        return queue_place(job, queued, running, self._records.store.mean_run_s)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job and keep its record. A job that has ended stays as it is.

        Returns once the run has ended on the device. A video that is already being written is not
        stopped: the job is returned as completed.

        Raises:
            NotFound: there is none.

        """
        self.get(job_id)
        return await self._uninterrupted(self._cancel(job_id))

    async def delete(self, job_id: str) -> Job:
        """Stop a job if it has not ended, and remove its record and files.

        Returns the last record.

        Raises:
            NotFound: there is none.

        """
        self.get(job_id)
        return await self._uninterrupted(self._delete(job_id))

    def content(self, job_id: str, variant: Literal["video", "thumbnail"] = "video") -> Path:
        """The file of a completed job: H.264 in MP4, or a WebP image.

        Raises:
            NotFound: there is no such job, it made no video, or its files have expired.
            Conflict: it has not ended.

        """
        job = self.get(job_id)
        if not job.state.final:
            raise Conflict(f"The job {job_id!r} is not completed yet: it is {job.state}.")
        if job.state is not JobState.COMPLETED:
            raise NotFound(f"The job {job_id!r} made no video: it is {job.state}.")
        path = self._outputs.find(job_id + SUFFIXES[variant])
        if path is None or (job.expires_at is not None and self._clock() >= job.expires_at):
            raise NotFound(f"The files of the job {job_id!r} have expired.")
        return path

    @property
    def _closing(self) -> bool:
        stopped = self._engine.state in (EngineState.DRAINING, EngineState.STOPPED)
        return stopped or not self._serving

    async def _uninterrupted(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish the work even if the caller leaves: memory and disk must agree."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _insert(self, store: JobStore, job: Job, image: Image | None) -> Job:
        try:
            if image is not None:
                await asyncio.to_thread(self._images.save, job.id, image)
            await self._records.write(store.insert, job)
        except BaseException:
            await asyncio.to_thread(self._images.remove, job.id)
            raise
        self._live[job.id] = job
        self._dispatch()
        return job

    def _dispatch(self) -> None:
        """Hand queued jobs to the engine, by priority and then age, while there are places."""
        while not self._closing and len(self._runs) < self._max_running:
            ready = (
                job
                for job in self._live.values()
                if job.state is JobState.QUEUED
                and job.id not in self._delays
                and job.id not in self._runs  # its last attempt is still being recorded
            )
            job = min(ready, key=lambda job: job.priority, default=None)
            if job is None:
                return
            if self._runs and (job.id in self._suspects or self._suspects & self._runs.keys()):
                return
            self._live[job.id] = replace(
                job,
                state=JobState.IN_PROGRESS,
                started_at=int(self._clock()),
                attempts=job.attempts + 1,
            )
            run = _Run(asyncio.create_task(self._run(job.id), name=job.id))
            self._runs[job.id] = run
            # Not a `finally` of the coroutine: cancelled before its first step, it runs none.
            run.task.add_done_callback(partial(self._on_run_ended, job.id, run))

    def _on_run_ended(self, job_id: str, run: _Run, task: asyncio.Task[None]) -> None:
        assert self._runs.pop(job_id) is run, "a job has one run at a time"
        self._suspects.discard(job_id)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s could not be recorded", job_id, exc_info=task.exception())
        self._dispatch()

    async def _run(self, job_id: str) -> None:
        run = self._runs[job_id]
        try:
            # Written before the attempt begins: one that kills the process must count.
            await self._records.write(self._records.store.update, self._live[job_id])
            result = await self._make(self._live[job_id], run)
            await self._finish(self._live[job_id], run, result)
        except EngineError as error:
            run.interruptible = False
            await self._on_error(self._live[job_id], error)
        except Exception as error:
            run.interruptible = False
            log.exception("%s failed", job_id)
            full = NoSpaceLeft.of(error, "the result")
            # Any other reason stays in the log: it may name files of this machine.
            reason = JobError(EngineError.code, "The video could not be made.")
            if full is not None:
                reason = JobError(full.code, full.message)
            await self._end(self._live[job_id], JobState.FAILED, reason)

    async def _make(self, job: Job, run: _Run) -> VideoResult:
        image = None
        if job.request["image"]:
            image = await asyncio.to_thread(self._images.load, job.id)
        request = from_json(job, image, self._clock())
        maker = VideoMaker(self._engine, partial(self._on_progress, run, job.id), self._clock)
        result = await maker.make(request)
        run.run_s = maker.run_s
        run.cuts = maker.cuts
        return result

    async def _on_progress(self, run: _Run, job_id: str, progress: float) -> None:
        self._live[job_id] = replace(self._live[job_id], progress=progress)
        if self._clock() - run.written_at >= PROGRESS_EVERY_S:
            run.written_at = self._clock()
            await self._records.write(self._records.store.update, self._live[job_id])

    async def _finish(self, job: Job, run: _Run, result: VideoResult) -> None:
        run.interruptible = False
        frames, height, width, _ = result.frames.shape
        request = job.request | {
            "width": width,
            "height": height,
            "num_frames": frames,
            "fps": result.fps,
            "seconds": frames / result.fps,
            "seed": result.seed,
            "cut": [asdict(cut) for cut in run.cuts],
        }
        with self._outputs.held(job.id):
            await asyncio.to_thread(save_video, self._outputs, job.id, result)
            now = self._clock()
            await asyncio.to_thread(self._outputs.prune, now)
            expires_at = now + self._outputs.max_age_s
            job = replace(
                job,
                request=request,
                progress=1.0,
                expires_at=int(expires_at) if math.isfinite(expires_at) else None,
                run_s=run.run_s,
            )
            await self._end(job, JobState.COMPLETED)

    async def _on_error(self, job: Job, error: EngineError) -> None:
        too_late = isinstance(error, QueueTimeout) and left_s(job, self._clock()) == 0
        # The next day or month is too far away to wait for.
        spent = isinstance(error, BudgetExceeded) and not isinstance(error, BudgetReserved)
        if self._closing or (isinstance(error, Overloaded) and not too_late and not spent):
            job = _queued(job, attempts=job.attempts - 1)
            delay_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        elif isinstance(error, RETRIED) and job.attempts < self._max_attempts:
            delay_s = BACKOFF_S * 4 ** (job.attempts - 1)
            job = _queued(job)
        else:
            log.warning("%s failed: %s", job.id, error)
            await self._end(job, JobState.FAILED, JobError(error.code, error.message))
            return
        self._live[job.id] = job
        try:
            await self._records.write(self._records.store.update, job)
        finally:
            # Not before: the next attempt must not begin while this one is being recorded.
            if not self._closing:
                log.warning("%s: %s; once more in %.0f s", job.id, error, delay_s)
                self._delays[job.id] = asyncio.create_task(self._delay(job.id, delay_s))

    async def _delay(self, job_id: str, delay_s: float) -> None:
        await self._sleep(delay_s)
        del self._delays[job_id]
        self._dispatch()

    async def _interrupt(self, run: _Run) -> None:
        """Return once the run has ended."""
        # Once only: a second cancellation would break off the clean-up after the first.
        if run.interruptible and not run.interrupted:
            run.interrupted = True
            run.task.cancel()
        await asyncio.wait([run.task])

    async def _cancel(self, job_id: str) -> Job:
        if job_id in self._runs:
            await self._interrupt(self._runs[job_id])
        if job_id in self._delays:
            self._delays.pop(job_id).cancel()
        job = self.get(job_id)
        return job if job.state.final else await self._end(job, JobState.CANCELLED)

    async def _delete(self, job_id: str) -> Job:
        job = await self._cancel(job_id)
        # The record first: files without a record are found and removed, but a record without
        # files would be false.
        await self._records.write(self._records.store.delete, job_id)
        self._unrecorded.pop(job_id, None)
        await asyncio.to_thread(self._outputs.remove, job_id)
        return job

    async def _end(self, job: Job, state: JobState, error: JobError | None = None) -> Job:
        job = replace(job, state=state, error=error, completed_at=int(self._clock()))
        self._live[job.id] = job
        try:
            await self._records.write(self._records.store.update, job)
        except Exception:  # a full disk: whoever waits is told all the same
            log.exception("the end of %s cannot be recorded for now", job.id)
            self._unrecorded[job.id] = job
        await asyncio.to_thread(self._images.remove, job.id)
        del self._live[job.id]
        self._wake_waiters()
        return job

    def _wake_waiters(self) -> None:
        self._one_ended.set()
        self._one_ended = asyncio.Event()

    async def _keep_pruning(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._outputs.prune, self._clock())
                await self._record_ends()
            except Exception:  # of the disk, and maybe for a while only
                log.exception("outputs could not be pruned, or ends of jobs not be recorded")
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _record_ends(self) -> None:
        for job in tuple(self._unrecorded.values()):
            await self._records.write(self._records.store.update, job)
            self._unrecorded.pop(job.id, None)

    def _on_removed(self, stems: frozenset[str]) -> None:
        """Note that files are gone. Called from any thread."""
        self._records.expire(stems, int(self._clock()))


def _queued(job: Job, *, attempts: int | None = None) -> Job:
    return replace(
        job,
        state=JobState.QUEUED,
        progress=0.0,
        started_at=None,
        attempts=job.attempts if attempts is None else attempts,
    )
