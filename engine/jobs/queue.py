"""Jobs: video requests that outlive their connection, and the process.

A job is committed to disk before it is acknowledged. A kill at any moment leaves either an
unfinished job, which the next start puts back in the queue, or a completed one with whole files:
files are written under other names, synced and renamed, and only then is the job called completed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from engine.engine import Engine
from engine.errors import (
    Conflict,
    EngineError,
    InvalidRequest,
    LoadFailed,
    NotFound,
    OutOfDeviceMemory,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import ImageResult, Progress, VideoResult
from engine.jobs.store import Job, JobError, JobState, JobStore
from engine.media.mp4 import write_mp4, write_thumbnail
from engine.media.outputs import Outputs, sync
from engine.requests import (
    ImageOperation,
    ImageRequest,
    LoraChoice,
    Quality,
    SchedulingOptions,
    VideoRequest,
)
from engine.status import EngineState

__all__ = ["Job", "JobError", "JobState", "Jobs", "QueuePlace"]

log = logging.getLogger(__name__)

FOLDER = "jobs"
"""Under `data_dir`: a folder for each unfinished job that came with an image."""

FIRST_FRAME_SHARE = 0.2
"""How much of a job's progress making its first frame is, where an image model makes it."""

PROGRESS_EVERY_S = 1.0
"""How often progress is written to disk, at most."""

PRUNE_EVERY_S = 600.0
"""How often the age of outputs is looked at while nothing else happens."""

BACKOFF_S = 1.0
"""The wait before the second attempt; each later one is four times as long."""

MAX_ATTEMPTS = 3

RETRIED = (OutOfDeviceMemory, RuntimeFailed, LoadFailed)
"""What another attempt may mend. `Overloaded` is no attempt: the job did not begin."""

_ID = re.compile(r"video_[0-9a-f]{32}")
_INPUT_IMAGE = "input.png"
_SUFFIXES = {"video": ".mp4", "thumbnail": ".webp"}
_HANDLED_APART = frozenset(
    {"model", "request_id", "operation", "image", "loras", "scheduling", "terms"}
)
"""Of a request's fields and of the keys of a record."""

Sleep = Callable[[float], Awaitable[None]]
T = TypeVar("T")
ResultT = TypeVar("ResultT", ImageResult, VideoResult)


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a queued job stands."""

    position: int
    """Queued jobs that go before it; 0 is the next."""
    eta_s: float | None
    """Seconds until it is expected to be completed; None while a model's duration is unknown."""


@dataclass(slots=True)
class _Run:
    """The attempt of a job that is being made."""

    task: asyncio.Task[None]
    interruptible: bool = True
    """Not once the frames are there: to write them takes seconds, to make them again minutes."""
    interrupted: bool = False
    written_at: float = -math.inf
    """When its progress was written to disk."""
    run_s: float = 0.0


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

        `max_running` jobs at a time are handed to the engine, whose scheduler does the rest.
        `clock` gives unix seconds; `sleep` waits out the time between attempts.
        """
        self._engine = engine
        self._outputs = outputs
        self._max_running = max_running
        self._max_attempts = max_attempts
        self._clock = clock
        self._sleep = sleep
        self._folder = engine.config.data_dir / FOLDER
        self._store: JobStore | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._changing = asyncio.Lock()
        """Held by `start` and `stop`."""
        self._serving = False
        """Between the end of `start` and the beginning of `stop`."""
        self._live: dict[str, Job] = {}
        """The jobs that have not ended, oldest first; newer than their records."""
        self._runs: dict[str, _Run] = {}
        self._delays: dict[str, asyncio.Task[None]] = {}
        """Queued jobs that wait for the time of their next attempt."""
        self._suspects: set[str] = set()
        """Jobs that ran when the process died. Each runs alone, so that one that kills the process
        every time uses up its own attempts and not those of the job beside it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pruning: asyncio.Task[None] | None = None
        self._one_ended = asyncio.Event()
        """Set, and replaced, each time a job has ended."""

    async def start(self) -> None:
        """Open the records and put unfinished jobs back in the queue.

        Call it once the engine has started, or a process killed while it starts counts as an
        attempt of the jobs that wait for it.

        Raises:
            ConfigError: the records cannot be used; they are left as they are.

        """
        async with self._changing:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="jobs")
            try:
                self._store = await self._write(JobStore, self._engine.config.data_dir)
                for job in await self._write(self._store.unfinished):
                    await self._take_up(self._store, job)
                await asyncio.to_thread(self._remove_leftovers)
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
            await self._write(store.update, self._live[job.id])
        else:
            message = f"The process ended {job.attempts} times while this job ran."
            await self._end(job, JobState.FAILED, JobError(RuntimeFailed.code, message))

    async def stop(self) -> None:
        """Interrupt what runs. Unfinished jobs stay for the next start, and lose no attempt.

        Call it before the engine drains, which would wait for the jobs. A video whose frames are
        there already is still written, which takes seconds.
        """
        async with self._changing:
            if self._store is None:
                return
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
                    await self._write(self._store.update, _queued(job, attempts=job.attempts - 1))
            await self._close()

    async def _close(self) -> None:
        writer, store = self._writer, self._store
        self._writer = self._store = None  # who prunes now finds nobody to tell
        if writer is not None:
            await asyncio.to_thread(writer.shutdown)
        if store is not None:
            store.close()
        self._live.clear()
        self._suspects.clear()
        self._wake_waiters()

    async def submit(self, request: VideoRequest) -> Job:
        """Check a request and queue it. The job is on disk when this returns.

        `request_id` is not used. Without a timeout a job waits as long as it must; with one it
        fails if it is not granted the device within that time of its creation.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: naming the field at fault.
            NotLoaded: its scheduling options ask for a loaded model, and it is not.
            Overloaded: too many jobs wait, or the engine starts or shuts down.

        """
        store = self._opened()
        if self._closing:
            raise ShuttingDown("No new jobs are taken at this moment.", retry_after_s=5.0)
        if len(self._live) >= self._engine.config.max_queue:
            raise QueueFull(
                f"{len(self._live)} jobs are unfinished, the engine's bound.", retry_after_s=60.0
            )
        job_id = f"video_{uuid.uuid4().hex}"
        model = self._engine.config.find(request.model)
        request = replace(request, model=model.id, request_id=job_id)
        prepared = self._engine.prepare(request).request
        if request.scheduling.if_loaded_only:
            await self._engine.check_loaded(model.id)
        if not isinstance(prepared, VideoRequest):
            raise InvalidRequest(f"{model.id!r} makes no videos.", param="model")
        if prepared.seed is None:  # so that every attempt makes the same video
            prepared = replace(prepared, seed=secrets.randbelow(2**32))
        first_frame = self._first_frame_request(prepared)
        if first_frame is not None:
            self._engine.prepare(first_frame)
        job = Job(
            id=job_id,
            model=model.id,
            request=_to_json(prepared),
            priority=prepared.scheduling.priority,
            state=JobState.QUEUED,
            progress=0.0,
            created_at=int(self._clock()),
        )
        return await self._uninterrupted(self._insert(store, job, prepared.image))

    def get(self, job_id: str) -> Job:
        """One job, as it is at this moment.

        Raises:
            NotFound: there is none.

        """
        store = self._opened()
        return self._live.get(job_id) or store.get(job_id)

    async def ended(self, job_id: str) -> Job:
        """Wait until the job has ended and its record says so on disk.

        Raises:
            NotFound: there is none, or it was deleted meanwhile.
            Overloaded: the jobs were stopped meanwhile.

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
        jobs, has_more = self._opened().list(limit=limit, after=after, order=order)
        return [self._live.get(job.id, job) for job in jobs], has_more

    def place(self, job_id: str) -> QueuePlace | None:
        """Where a job stands in the queue; None when it is not queued.

        The time is the mean duration of each model's last jobs, one job after the other: they
        share one device.

        Raises:
            NotFound: there is none.

        """
        job = self.get(job_id)
        if job.state is not JobState.QUEUED:
            return None
        queued = sorted(
            (each for each in self._live.values() if each.state is JobState.QUEUED),
            key=lambda each: each.priority,
        )
        position = queued.index(job)
        running = [self._live[each] for each in self._runs if each in self._live]
        ahead = [*running, *queued[: position + 1]]
        store = self._opened()
        mean_s = {model: store.mean_run_s(model) for model in {each.model for each in ahead}}
        eta_s = 0.0
        for each in ahead:
            duration_s = mean_s[each.model]
            if duration_s is None:
                return QueuePlace(position, None)
            eta_s += duration_s * (1 - each.progress)
        return QueuePlace(position, eta_s)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job and keep its record. One that has ended stays as it is.

        Returns once the run has let go of the device. A video that is only being written is not
        stopped: the job comes back completed.

        Raises:
            NotFound: there is none.

        """
        self.get(job_id)
        return await self._uninterrupted(self._cancel(job_id))

    async def delete(self, job_id: str) -> Job:
        """Stop a job if it has not ended, and remove its record and files. Returns the last record.

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
        path = self._outputs.find(job_id + _SUFFIXES[variant])
        if path is None or (job.expires_at is not None and self._clock() >= job.expires_at):
            raise NotFound(f"The files of the job {job_id!r} have expired.")
        return path

    @property
    def _closing(self) -> bool:
        stopped = self._engine.state in (EngineState.DRAINING, EngineState.STOPPED)
        return stopped or not self._serving

    def _opened(self) -> JobStore:
        if self._store is None:
            raise _not_served()
        return self._store

    async def _write(self, function: Callable[..., T], *args: Any) -> T:
        """Call a writing method of the store on the one thread that may; in order of the calls."""
        if self._writer is None:
            raise _not_served()
        return await asyncio.get_running_loop().run_in_executor(self._writer, function, *args)

    async def _uninterrupted(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish what was begun, even if the caller leaves: memory and disk must agree."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _insert(self, store: JobStore, job: Job, image: Image.Image | None) -> Job:
        try:
            if image is not None:
                await asyncio.to_thread(_save_image, self._folder / job.id, image)
            await self._write(store.insert, job)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, self._folder / job.id, ignore_errors=True)
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
                if job.state is JobState.QUEUED and job.id not in self._delays
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
            # Not a `finally` of the coroutine: one cancelled before its first step has none.
            run.task.add_done_callback(partial(self._on_run_ended, job.id))

    def _on_run_ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        del self._runs[job_id]
        self._suspects.discard(job_id)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s could not be recorded", job_id, exc_info=task.exception())
        self._dispatch()

    async def _run(self, job_id: str) -> None:
        run = self._runs[job_id]
        try:
            # On disk before it begins: an attempt that kills the process must count.
            await self._write(self._opened().update, self._live[job_id])
            result = await self._generate(self._live[job_id], run)
            await self._finish(self._live[job_id], run, result)
        except EngineError as error:
            run.interruptible = False
            await self._on_error(self._live[job_id], error)
        except Exception:
            run.interruptible = False
            log.exception("%s failed", job_id)
            # The reason stays in the log: it may name files of this machine.
            reason = JobError(EngineError.code, "The video could not be made.")
            await self._end(self._live[job_id], JobState.FAILED, reason)

    async def _generate(self, job: Job, run: _Run) -> VideoResult:
        image = None
        if job.request["image"]:
            image = await asyncio.to_thread(_load_image, self._folder / job.id)
        request = _from_json(job, image, self._clock())
        begin = 0.0
        first_frame = self._first_frame_request(request)
        if first_frame is not None:
            begin = FIRST_FRAME_SHARE
            made = await self._collect(run, job.id, first_frame, ImageResult, 0.0, begin)
            request = replace(request, image=made.images[0])
        result = await self._collect(run, job.id, request, VideoResult, begin, 1.0)
        return result

    def _first_frame_request(self, request: VideoRequest) -> ImageRequest | None:
        """What makes the image that the video starts from, where the model is set up so."""
        model = self._engine.config.find(request.model)
        image_model = model.options.get("first_frame_model")
        if image_model is None or request.image is not None:
            return None
        return ImageRequest(
            model=image_model,
            operation=ImageOperation.GENERATION,
            request_id=request.request_id,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            seed=request.seed,
            # Whether it is loaded, and how long it stays, was said of the video's model.
            scheduling=replace(request.scheduling, if_loaded_only=False, keep_alive_s=None),
        )

    async def _collect(
        self,
        run: _Run,
        job_id: str,
        request: ImageRequest | VideoRequest,
        kind: type[ResultT],
        begin: float,
        end: float,
    ) -> ResultT:
        """The result of a run whose progress is the job's from `begin` to `end`."""
        session = await self._engine.open(request)
        opened_at = self._clock()
        result: ResultT | None = None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Progress):
                    await self._on_progress(run, job_id, begin + (end - begin) * event.done)
                elif isinstance(event, kind):
                    result = event
        if result is None:
            raise RuntimeFailed(f"{request.model!r} ended without a result.")
        run.run_s += session.timings.run_ms / 1e3 + max(0.0, self._clock() - opened_at)
        return result

    async def _on_progress(self, run: _Run, job_id: str, progress: float) -> None:
        self._live[job_id] = replace(self._live[job_id], progress=progress)
        if self._clock() - run.written_at >= PROGRESS_EVERY_S:
            run.written_at = self._clock()
            await self._write(self._opened().update, self._live[job_id])

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
        }
        with self._outputs.held(job.id):
            await asyncio.to_thread(self._save, job.id, result)
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

    def _save(self, job_id: str, result: VideoResult) -> None:
        def thumbnail(path: Path) -> None:
            write_thumbnail(path, result.frames[0])

        def video(path: Path) -> None:
            write_mp4(path, result.frames, result.fps)

        self._outputs.add(job_id + _SUFFIXES["thumbnail"], thumbnail)
        self._outputs.add(job_id + _SUFFIXES["video"], video)

    async def _on_error(self, job: Job, error: EngineError) -> None:
        too_late = isinstance(error, QueueTimeout) and _left_s(job, self._clock()) == 0
        if self._closing or (isinstance(error, Overloaded) and not too_late):
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
        if not self._closing:
            log.warning("%s: %s; once more in %.0f s", job.id, error, delay_s)
            self._delays[job.id] = asyncio.create_task(self._delay(job.id, delay_s))
        await self._write(self._opened().update, job)

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
        # The record first: files without one are found and removed, one without files is a lie.
        await self._write(self._opened().delete, job_id)
        await asyncio.to_thread(self._outputs.remove, job_id)
        return job

    async def _end(self, job: Job, state: JobState, error: JobError | None = None) -> Job:
        job = replace(job, state=state, error=error, completed_at=int(self._clock()))
        self._live[job.id] = job
        await self._write(self._opened().update, job)
        await asyncio.to_thread(shutil.rmtree, self._folder / job.id, ignore_errors=True)
        del self._live[job.id]
        self._wake_waiters()
        return job

    def _wake_waiters(self) -> None:
        self._one_ended.set()
        self._one_ended = asyncio.Event()

    async def _keep_pruning(self) -> None:
        while True:
            await asyncio.to_thread(self._outputs.prune, self._clock())
            await asyncio.sleep(PRUNE_EVERY_S)

    def _on_removed(self, stems: frozenset[str]) -> None:
        """Any thread; not awaited, because who prunes has no use for the outcome."""
        store, writer = self._store, self._writer
        if store is None or writer is None:
            return
        expire = partial(store.expire, stems, int(self._clock()))
        with suppress(RuntimeError):  # shut down meanwhile; that the file is gone says the same
            writer.submit(expire).add_done_callback(_log_failure)

    def _remove_leftovers(self) -> None:
        """Remove the folders of jobs that were never committed, or ended as the process died."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        sync(self._folder.parent)
        for path in self._folder.glob("video_*"):
            if _ID.fullmatch(path.name) and path.name not in self._live:
                shutil.rmtree(path, ignore_errors=True)


def _not_served() -> Overloaded:
    return Overloaded("Jobs are not served at this moment.", retry_after_s=5.0)


def _queued(job: Job, *, attempts: int | None = None) -> Job:
    return replace(
        job,
        state=JobState.QUEUED,
        progress=0.0,
        started_at=None,
        attempts=job.attempts if attempts is None else attempts,
    )


def _to_json(request: VideoRequest) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(request)]
    values = {name: getattr(request, name) for name in fields if name not in _HANDLED_APART}
    if values["seconds"] is None and request.num_frames and request.fps:
        values["seconds"] = request.num_frames / request.fps
    loras = [dataclasses.asdict(lora) for lora in request.loras]
    scheduling = dataclasses.asdict(request.scheduling)
    del scheduling["priority"]  # has a column of its own
    return {**values, "loras": loras, "terms": scheduling, "image": request.image is not None}


def _from_json(job: Job, image: Image.Image | None, now: float) -> VideoRequest:
    values = {name: value for name, value in job.request.items() if name not in _HANDLED_APART}
    if values["num_frames"] is not None:  # `seconds` is only another way to say so
        values["seconds"] = None
    values["quality"] = Quality(values["quality"])
    return VideoRequest(
        **values,
        model=job.model,
        request_id=job.id,
        image=image,
        loras=tuple(LoraChoice(**lora) for lora in job.request["loras"]),
        scheduling=SchedulingOptions(
            **{**_scheduling(job), "priority": job.priority, "timeout_s": _left_s(job, now)}
        ),
    )


def _scheduling(job: Job) -> dict[str, Any]:
    scheduling: dict[str, Any] = job.request.get("terms", {})  # early records have none
    return scheduling


def _left_s(job: Job, now: float) -> float:
    """Seconds until the job has waited too long, 0 at least; `now` in Unix seconds."""
    timeout_s = _scheduling(job).get("timeout_s")
    return math.inf if timeout_s is None else max(0.0, job.created_at + timeout_s - now)


def _save_image(folder: Path, image: Image.Image) -> None:
    folder.mkdir(mode=0o700)
    path = folder / _INPUT_IMAGE
    image.save(path, compress_level=1)  # lossless at any level; higher ones take seconds
    sync(path)
    sync(folder)
    sync(folder.parent)


def _load_image(folder: Path) -> Image.Image:
    with Image.open(folder / _INPUT_IMAGE) as image:
        image.load()
        return image


def _log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("cannot note that outputs expired", exc_info=error)
