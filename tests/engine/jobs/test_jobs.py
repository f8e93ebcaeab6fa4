"""Jobs on a real engine with a fake runtime, a real database and real files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from engine import model_folder
from engine.caller import Caller
from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import (
    ConfigError,
    Conflict,
    EngineError,
    InsufficientCapacity,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    NotFound,
    NotLoaded,
    OutOfDeviceMemory,
    Overloaded,
    QueueFull,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import Event, Progress
from engine.files.hub.selection import HubSource
from engine.files.source import STARTER
from engine.jobs import queue
from engine.jobs.queue import Jobs
from engine.jobs.queue_place import QueuePlace
from engine.jobs.store import FILE_NAME, Job, JobState, JobStore
from engine.media.outputs import Outputs
from engine.model_folder import Builder
from engine.requests import (
    ImageRequest,
    LoraChoice,
    Priority,
    Quality,
    Request,
    SchedulingOptions,
    VideoRequest,
)
from engine.runtimes.base import Prepared
from engine.runtimes.registry import REGISTRY
from tests.engine.jobs.fake_video import (
    ADDRESS,
    NAME,
    FakeVideoRuntime,
    frames_of,
    make,
    serving,
    video_engine,
)
from tests.engine.scheduling.world import Clock

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def fake_registered(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> None:
    monkeypatch.setitem(REGISTRY, NAME, ADDRESS)


@pytest.fixture
def runtime() -> FakeVideoRuntime:
    return FakeVideoRuntime()


@pytest.fixture
def engine(runtime: FakeVideoRuntime, tmp_path: Path) -> Engine:
    return video_engine(runtime, tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock(now=1_000_000.0)


@pytest.fixture
async def jobs(engine: Engine, clock: Clock) -> AsyncIterator[Jobs]:
    async with serving(engine, clock=clock, sleep=Naps()) as jobs:
        yield jobs


class Naps:
    """Waits between attempts that are over at once, and recorded."""

    def __init__(self) -> None:
        self.taken_s: list[float] = []

    async def __call__(self, delay_s: float) -> None:
        self.taken_s.append(delay_s)


class Stage:
    """Runs that go on only when told to."""

    def __init__(self, runtime: FakeVideoRuntime) -> None:
        runtime.answer = self.play
        self.playing: asyncio.Queue[str] = asyncio.Queue()
        self.closed: list[str] = []
        """Prompts of the runs that were closed before their end."""
        self._curtains: dict[str, asyncio.Event] = {}

    async def play(self, request: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.25)
        self._curtains[request.prompt] = asyncio.Event()
        self.playing.put_nowait(request.prompt)
        try:
            await self._curtains[request.prompt].wait()
        except BaseException:
            self.closed.append(request.prompt)
            raise
        async for event in make(request):
            yield event

    async def begun(self) -> str:
        """The prompt of the run that began next."""
        async with asyncio.timeout(30):
            return await self.playing.get()

    def end(self, prompt: str) -> None:
        self._curtains[prompt].set()


def ask(model: str = "film", prompt: str = "a train", **fields: Any) -> VideoRequest:
    return VideoRequest(model=model, request_id="unused", prompt=prompt, **fields)


def decoded(path: Path) -> np.ndarray[Any, Any]:
    """All pixels of a video; fails on a torn file."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == container.streams.video[0].frames
    return np.stack(frames)


async def test_a_job_is_checked_by_the_files_that_this_machine_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is stored: nobody may have used the model yet."""
    built = tmp_path / "built"

    def build(_name: str, _cache: Path) -> Path:
        built.mkdir()
        return built

    builders = {**model_folder.BUILDERS, STARTER: Builder(build, lambda *_: built)}
    monkeypatch.setattr(model_folder, "BUILDERS", builders)

    class Choosy(FakeVideoRuntime):
        @classmethod
        def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
            return (HubSource(model.source, ("*",)),)

        def prepare(self, model: ModelConfig, request: Request) -> Prepared:
            if built.exists():
                raise InvalidRequest("no setting for motion", param="motion")
            return super().prepare(model, request)

    models = [{"id": "film", "runtime": NAME, "task": "video", "source": "starter:film"}]
    async with serving(video_engine(Choosy(), tmp_path, models=models)) as jobs:
        with pytest.raises(InvalidRequest) as raised:
            await jobs.submit(ask(motion=180))
        assert raised.value.param == "motion"
        assert jobs.list(limit=10) == ([], False)


async def test_a_job_makes_its_file(
    jobs: Jobs, runtime: FakeVideoRuntime, clock: Clock, engine: Engine
) -> None:
    submitted = await jobs.submit(
        ask("sora-2", seed=77, seconds=1.5, quality=Quality.LOW, loras=(LoraChoice("ink", 0.5),))
    )
    assert submitted.id.startswith("video_") and len(submitted.id) == 6 + 32
    assert (submitted.model, submitted.state, submitted.attempts) == ("film", JobState.QUEUED, 0)
    asked = {"prompt": "a train", "width": 64, "height": 48, "num_frames": 12, "fps": 8}
    asked |= {"seconds": 1.5, "seed": 77, "quality": "low", "image": False}
    asked |= {"loras": [{"name": "ink", "weight": 0.5}]}
    assert asked.items() <= json.loads(json.dumps(submitted.request)).items()

    job = await jobs.ended(submitted.id)
    assert (job.state, job.error, job.progress, job.attempts) == (JobState.COMPLETED, None, 1.0, 1)
    assert asked.items() <= job.request.items()
    assert job.created_at == job.started_at == job.completed_at == clock.now
    assert job.expires_at == clock.now + engine.config.max_data_age
    (request,) = runtime.requests
    assert (request.request_id, request.quality) == (job.id, Quality.LOW)
    assert request.loras == (LoraChoice("ink", 0.5),)
    shown = decoded(jobs.content(job.id, "video"))
    assert shown.shape == (12, 48, 64, 3)
    assert np.abs(shown.astype(int) - frames_of(request)).max() <= 3
    with Image.open(jobs.content(job.id, "thumbnail")) as thumbnail:
        assert thumbnail.size == (64, 48)


async def test_a_job_is_for_the_model_that_its_route_chooses(
    runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    route = {"id": "auto", "choose": ["film", "other"], "profiles": {"quality": "other"}}
    caller = Caller("anna", "paid")
    async with serving(video_engine(runtime, tmp_path, routes=[route])) as jobs:
        request = ask("auto", quality=Quality.HIGH, scheduling=SchedulingOptions(caller=caller))
        submitted = await jobs.submit(request)
        assert submitted.model == "other"
        await jobs.ended(submitted.id)
    (ran,) = runtime.requests
    assert (ran.model, ran.scheduling.caller) == ("other", caller)


async def test_a_seed_is_drawn_once_so_that_all_attempts_are_alike(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    runtime.answer = failing(RuntimeFailed("torn"), times=1)
    one, other = await jobs.submit(ask()), await jobs.submit(ask())
    await jobs.ended(one.id)
    await jobs.ended(other.id)
    assert one.request["seed"] != other.request["seed"]
    drawn = {one.id: one.request["seed"], other.id: other.request["seed"]}
    assert len(runtime.requests) == 3
    assert all(request.seed == drawn[request.request_id] for request in runtime.requests)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask("nobody"), ModelNotFound),
        (ask(width=13), InvalidRequest),
    ],
)
async def test_a_bad_request_is_refused_at_once_and_leaves_nothing(
    jobs: Jobs, request_: VideoRequest, error: type[EngineError]
) -> None:
    with pytest.raises(error):
        await jobs.submit(request_)
    assert jobs.list() == ([], False)


async def test_a_bad_first_frame_is_refused_at_once(
    jobs: Jobs, runtime: FakeVideoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = runtime.prepare

    def picky(model: Any, request: Any) -> Any:
        if isinstance(request, ImageRequest):
            raise InvalidRequest("too wide to paint", param="size")
        return prepare(model, request)

    monkeypatch.setattr(runtime, "prepare", picky)
    with pytest.raises(InvalidRequest, match="too wide"):
        await jobs.submit(ask("chained"))
    await jobs.submit(ask("chained", image=Image.new("RGB", (8, 8))))


async def test_too_many_jobs_are_refused(runtime: FakeVideoRuntime, tmp_path: Path) -> None:
    Stage(runtime)
    async with serving(video_engine(runtime, tmp_path, max_queue=2)) as jobs:
        await jobs.submit(ask())
        job = await jobs.submit(ask())
        with pytest.raises(QueueFull):
            await jobs.submit(ask())
        await jobs.cancel(job.id)
        await jobs.submit(ask())


async def test_the_input_image_is_kept_lossless_until_the_job_ends(
    jobs: Jobs, runtime: FakeVideoRuntime, engine: Engine
) -> None:
    stage = Stage(runtime)
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    job = await jobs.submit(ask(prompt="one", image=Image.fromarray(pixels)))
    await stage.begun()
    folder = engine.config.data_dir / "jobs" / job.id
    assert folder.is_dir()
    assert runtime.requests[0].image.mode == "RGB"
    assert (np.asarray(runtime.requests[0].image) == pixels).all()
    stage.end("one")
    await jobs.ended(job.id)
    assert not folder.exists()


async def test_at_most_two_run_by_priority_and_then_age(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    stage = Stage(runtime)
    ids = {}
    for model, prompt in (("film", "a"), ("other", "b")):
        ids[prompt] = (await jobs.submit(ask(model, prompt))).id
    assert {await stage.begun(), await stage.begun()} == {"a", "b"}
    for prompt, priority in (
        ("c", Priority.BATCH),
        ("d", Priority.BATCH),
        ("e", Priority.INTERACTIVE),
    ):
        ids[prompt] = (
            await jobs.submit(ask(prompt=prompt, scheduling=SchedulingOptions(priority=priority)))
        ).id
    places = {prompt: jobs.place(job_id) for prompt, job_id in ids.items()}
    assert {prompt: place and place.position for prompt, place in places.items()} == {
        "a": None,
        "b": None,
        "e": 0,
        "c": 1,
        "d": 2,
    }
    order: list[str] = []
    for done in "aecd":
        assert stage.playing.empty()
        assert len(runtime.requests) == 2 + len(order)
        stage.end(done)
        await jobs.ended(ids[done])
        if done != "d":
            order.append(await stage.begun())
    assert order == ["e", "c", "d"]
    assert [request.scheduling.priority for request in runtime.requests[2:]] == [
        Priority.INTERACTIVE,
        Priority.BATCH,
        Priority.BATCH,
    ]


async def test_progress_is_seen_as_it_is(jobs: Jobs, runtime: FakeVideoRuntime) -> None:
    stage = Stage(runtime)
    job = await jobs.submit(ask(prompt="one"))
    await stage.begun()
    seen = jobs.get(job.id)
    assert (seen.state, seen.progress, seen.attempts) == (JobState.IN_PROGRESS, 0.25, 1)
    assert jobs.list()[0] == [seen]
    with pytest.raises(Conflict, match="in_progress"):
        jobs.content(job.id)


async def test_progress_is_written_at_most_once_a_second(
    jobs: Jobs, runtime: FakeVideoRuntime, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    update = JobStore.update

    def watched(self: JobStore, job: Job) -> None:
        written.append(job.progress)
        update(self, job)

    async def steps(request: Any) -> AsyncGenerator[Event, None]:
        for step in range(1, 10):
            clock.now += 0.25
            yield Progress(step / 10)
        async for event in make(request):
            yield event

    monkeypatch.setattr(JobStore, "update", watched)
    runtime.answer = steps
    job = await jobs.submit(ask())
    await jobs.ended(job.id)
    assert written == [0.0, 0.1, 0.5, 0.9, 1.0]


async def test_the_first_frame_comes_from_the_image_model(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    stage = Stage(runtime)
    asked = ask("chained", "one", seed=5, width=80, height=64, negative_prompt="blur")
    job = await jobs.submit(asked)
    await stage.begun()
    assert jobs.get(job.id).progress == pytest.approx(0.2 * 0.25)
    stage.end("one")
    await stage.begun()
    assert jobs.get(job.id).progress == pytest.approx(0.2 + 0.8 * 0.25)
    stage.end("one")
    assert (await jobs.ended(job.id)).state is JobState.COMPLETED
    paint, film = runtime.requests
    assert isinstance(paint, ImageRequest)
    assert (paint.model, paint.prompt, paint.negative_prompt) == ("paint", "one", "blur")
    assert (paint.width, paint.height, paint.seed) == (80, 64, 5)
    assert film.image.size == (80, 64)
    assert film.image.getpixel((0, 0)) == (255, 0, 0)


async def test_an_image_of_the_request_needs_no_first_frame(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    job = await jobs.submit(ask("chained", image=Image.new("RGB", (64, 48), "blue")))
    await jobs.ended(job.id)
    (film,) = runtime.requests
    assert film.image.getpixel((0, 0)) == (0, 0, 255)


async def test_a_running_job_is_cancelled_and_its_device_given_back(
    jobs: Jobs, runtime: FakeVideoRuntime, engine: Engine
) -> None:
    stage = Stage(runtime)
    one = await jobs.submit(ask(prompt="one", image=Image.new("RGB", (8, 8))))
    await stage.begun()
    cancelled = await jobs.cancel(one.id)
    assert stage.closed == ["one"]
    assert engine.model_status("film").leases == 0
    assert cancelled.state is JobState.CANCELLED and cancelled.completed_at
    assert jobs.get(one.id) == cancelled
    assert not (engine.config.data_dir / "jobs" / one.id).exists()
    with pytest.raises(NotFound, match="cancelled"):
        jobs.content(one.id)
    runtime.answer = make
    two = await jobs.submit(ask(prompt="two"))
    assert (await jobs.ended(two.id)).state is JobState.COMPLETED
    assert len(runtime.requests) == 2


async def test_a_queued_job_is_cancelled_and_never_runs(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    stage = Stage(runtime)
    ids = [(await jobs.submit(ask(prompt=prompt))).id for prompt in ("a", "b", "c")]
    await stage.begun()
    assert (await jobs.cancel(ids[2])).state is JobState.CANCELLED
    # `b` waits in the engine: the fake runs one at a time.
    assert (await jobs.cancel(ids[1])).state is JobState.CANCELLED
    stage.end("a")
    assert (await jobs.ended(ids[0])).state is JobState.COMPLETED
    assert [request.prompt for request in runtime.requests] == ["a"]


async def test_a_job_cancelled_before_its_first_step_leaves_its_place(
    jobs: Jobs, runtime: FakeVideoRuntime
) -> None:
    stage = Stage(runtime)
    job = await jobs.submit(ask(prompt="a"))
    cancelling = [asyncio.create_task(jobs.cancel(job.id)) for _ in range(3)]
    assert {done.state for done in await asyncio.gather(*cancelling)} == {JobState.CANCELLED}
    ids = [await jobs.submit(ask(model, model)) for model in ("film", "other")]
    assert {await stage.begun(), await stage.begun()} == {"film", "other"}
    assert len(ids) == 2


async def test_cancelling_what_has_ended_changes_nothing(jobs: Jobs) -> None:
    job = await jobs.ended((await jobs.submit(ask())).id)
    assert await jobs.cancel(job.id) == job
    assert jobs.content(job.id).is_file()


async def test_a_video_that_is_being_written_is_not_thrown_away(
    jobs: Jobs, runtime: FakeVideoRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    writing, add = asyncio.Event(), Outputs.add

    def watched(self: Outputs, name: str, write: Any) -> None:
        loop.call_soon_threadsafe(writing.set)
        add(self, name, write)

    monkeypatch.setattr(Outputs, "add", watched)
    job = await jobs.submit(ask())
    await writing.wait()
    assert engine.model_status("film").leases == 0  # the device is free already
    assert (await jobs.cancel(job.id)).state is JobState.COMPLETED
    assert decoded(jobs.content(job.id)).shape[0] == 6


async def test_delete_removes_record_and_files(jobs: Jobs, engine: Engine) -> None:
    job = await jobs.ended((await jobs.submit(ask())).id)
    path = jobs.content(job.id)
    other = await jobs.ended((await jobs.submit(ask())).id)
    assert await jobs.delete(job.id) == job
    for gone in (jobs.get, jobs.content, jobs.place):
        with pytest.raises(NotFound):
            gone(job.id)
    with pytest.raises(NotFound):
        await jobs.delete(job.id)
    assert [each.stem for each in path.parent.iterdir()] == [other.id] * 2


async def test_delete_stops_what_runs(jobs: Jobs, runtime: FakeVideoRuntime) -> None:
    stage = Stage(runtime)
    job = await jobs.submit(ask(prompt="one"))
    await stage.begun()
    assert (await jobs.delete(job.id)).state is JobState.CANCELLED
    assert stage.closed == ["one"]
    with pytest.raises(NotFound):
        jobs.get(job.id)


@pytest.mark.parametrize("call", ["get", "content", "place"])
async def test_an_unknown_job_is_not_found(jobs: Jobs, call: str) -> None:
    with pytest.raises(NotFound, match="video_0"):
        getattr(jobs, call)("video_0")


@pytest.mark.parametrize("call", ["cancel", "delete", "ended"])
async def test_an_unknown_job_cannot_be_changed(jobs: Jobs, call: str) -> None:
    with pytest.raises(NotFound, match="video_0"):
        await getattr(jobs, call)("video_0")


def failing(error: EngineError, times: int) -> Any:
    """The first runs fail half-way, the later ones work."""
    left = [error] * times

    async def run(request: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.5)
        if left:
            raise left.pop()
        async for event in make(request):
            yield event

    return run


@pytest.mark.parametrize("error", [RuntimeFailed("torn"), LoadFailed("torn")])
async def test_a_failure_is_tried_again_after_a_while(
    engine: Engine, runtime: FakeVideoRuntime, error: EngineError
) -> None:
    runtime.answer = failing(error, times=2)
    naps = Naps()
    async with serving(engine, sleep=naps) as jobs:
        job = await jobs.ended((await jobs.submit(ask())).id)
    assert (job.state, job.attempts, job.error) == (JobState.COMPLETED, 3, None)
    assert naps.taken_s == [1.0, 4.0]


async def test_a_job_has_one_run_at_a_time(jobs: Jobs, runtime: FakeVideoRuntime) -> None:
    """The delay before an attempt may be over while the last one is still being recorded."""
    stage = Stage(runtime)
    failed = False

    async def answer(request: Any) -> AsyncGenerator[Event, None]:
        nonlocal failed
        if not failed:
            failed = True
            raise RuntimeFailed("once")
        async for event in stage.play(request):
            yield event

    runtime.answer = answer
    job = await jobs.submit(ask())
    await stage.begun()
    assert list(jobs._runs) == [job.id]
    assert (await jobs.cancel(job.id)).state is JobState.CANCELLED
    assert stage.closed == ["a train"]
    assert not jobs._runs


async def test_the_next_attempt_waits_until_the_last_one_is_recorded(
    jobs: Jobs, runtime: FakeVideoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    may_write = asyncio.Event()
    write = jobs._records.write

    async def slow_write(function: Any, *args: Any) -> Any:
        if args and isinstance(args[0], Job) and args[0].state is JobState.QUEUED and runs:
            await may_write.wait()
        return await write(function, *args)

    async def answer(request: Any) -> AsyncGenerator[Event, None]:
        runs.append(request.prompt)
        if len(runs) == 1:
            raise RuntimeFailed("once")
        async for event in make(request):
            yield event

    runtime.answer = answer
    monkeypatch.setattr(jobs._records, "write", slow_write)
    job = await jobs.submit(ask())
    while not runs:
        await asyncio.wait([jobs._runs[job.id].task], timeout=0.01)
    jobs._dispatch()  # as the end of another job does
    await asyncio.wait([jobs._runs[job.id].task], timeout=0.05)
    assert len(runs) == 1
    may_write.set()
    assert (await jobs.ended(job.id)).state is JobState.COMPLETED
    assert len(runs) == 2


async def test_pruning_goes_on_after_an_error(
    runtime: FakeVideoRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "PRUNE_EVERY_S", 0.01)
    calls, loop, again = 0, asyncio.get_running_loop(), asyncio.Event()

    def prune(_: Outputs, now: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "Input/output error")
        loop.call_soon_threadsafe(again.set)

    monkeypatch.setattr(Outputs, "prune", prune)
    async with serving(video_engine(runtime, tmp_path)), asyncio.timeout(30):
        await again.wait()


async def test_a_full_disk_is_told(
    jobs: Jobs, runtime: FakeVideoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    monkeypatch.setattr(queue, "save_video", full)
    job = await jobs.ended((await jobs.submit(ask())).id)
    assert job.error is not None
    assert job.error.code == "no_space_left"
    assert job.error.message == "The server has no space left for the result."


async def test_a_job_ends_though_its_end_cannot_be_recorded(
    jobs: Jobs, engine: Engine, runtime: FakeVideoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = JobStore.update

    def full(self: JobStore, job: Job) -> None:
        if job.state.final:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        update(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "update", full)
        job = await jobs.submit(ask())
        async with asyncio.timeout(30):
            ended = await jobs.ended(job.id)
        assert ended.state is JobState.COMPLETED
        assert jobs.list()[0] == [ended]
        assert jobs._records.store.get(job.id).state is JobState.IN_PROGRESS
    await jobs._record_ends()
    assert jobs._records.store.get(job.id) == ended


async def test_running_out_of_memory_is_tried_again(
    engine: Engine, runtime: FakeVideoRuntime
) -> None:
    # The engine itself tries once more: two runs are one attempt.
    runtime.answer = failing(OutOfDeviceMemory("full"), times=2)
    async with serving(engine, sleep=Naps()) as jobs:
        job = await jobs.ended((await jobs.submit(ask())).id)
    assert (job.state, job.attempts, len(runtime.requests)) == (JobState.COMPLETED, 2, 3)


async def test_the_third_failure_is_the_last(jobs: Jobs, runtime: FakeVideoRuntime) -> None:
    runtime.answer = failing(RuntimeFailed("torn"), times=3)
    job = await jobs.ended((await jobs.submit(ask())).id)
    assert (job.state, job.attempts) == (JobState.FAILED, 3)
    assert job.error and (job.error.code, job.error.message) == ("runtime_failed", "torn")
    assert len(runtime.requests) == 3
    with pytest.raises(NotFound, match="failed"):
        jobs.content(job.id)


@pytest.mark.parametrize("error", [InvalidRequest("no"), InsufficientCapacity("too big")])
async def test_what_will_fail_again_is_not_tried_again(
    jobs: Jobs, runtime: FakeVideoRuntime, error: EngineError
) -> None:
    runtime.answer = failing(error, times=1)
    job = await jobs.ended((await jobs.submit(ask())).id)
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.error and (job.error.code, job.error.message) == (error.code, error.message)


async def test_waiting_for_a_full_engine_is_no_attempt(
    engine: Engine, runtime: FakeVideoRuntime
) -> None:
    naps = Naps()
    runtime.answer = failing(QueueFull("full", retry_after_s=7.0), times=5)
    async with serving(engine, sleep=naps) as jobs:
        job = await jobs.ended((await jobs.submit(ask())).id)
    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
    assert naps.taken_s == [7.0] * 5


async def test_a_job_does_not_wait_for_the_next_day_of_a_budget(
    runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    spent = {"costs": {"price_per_hour": 1.0}, "budgets": [{"day": 0.0}]}
    engine = video_engine(runtime, tmp_path, **spent)
    naps = Naps()
    async with serving(engine, sleep=naps) as jobs:
        job = await jobs.ended((await jobs.submit(ask())).id)
    assert job.error and job.error.code == "budget_exceeded"
    assert naps.taken_s == []


async def test_a_job_that_waits_for_its_next_attempt_leaves_its_place_to_others(
    engine: Engine, runtime: FakeVideoRuntime
) -> None:
    asleep, called_off = asyncio.Event(), asyncio.Event()

    async def for_ever(delay_s: float) -> None:
        asleep.set()
        try:
            await asyncio.Event().wait()
        finally:
            called_off.set()

    runtime.answer = failing(RuntimeFailed("torn"), times=1)
    async with serving(engine, sleep=for_ever, max_running=1) as jobs:
        job = await jobs.submit(ask())
        await asleep.wait()
        assert (jobs.get(job.id).state, jobs.get(job.id).progress) == (JobState.QUEUED, 0.0)
        other = await jobs.submit(ask())
        assert (await jobs.ended(other.id)).state is JobState.COMPLETED
        assert (await jobs.cancel(job.id)).state is JobState.CANCELLED
        async with asyncio.timeout(10):
            await called_off.wait()


async def test_a_defect_fails_the_job_and_not_the_others(
    jobs: Jobs, runtime: FakeVideoRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    async def odd(request: Any) -> AsyncGenerator[Event, None]:
        async for event in make(request):
            yield event

    runtime.answer = odd
    job = await jobs.ended((await jobs.submit(ask(width=65))).id)
    assert job.state is JobState.FAILED
    assert job.error and job.error.message == "The video could not be made."
    assert "even sizes" in caplog.text
    other = await jobs.ended((await jobs.submit(ask())).id)
    assert other.state is JobState.COMPLETED


async def test_a_run_without_a_result_fails(jobs: Jobs, runtime: FakeVideoRuntime) -> None:
    async def empty(request: Any) -> AsyncGenerator[Event, None]:
        yield Progress(1.0)

    runtime.answer = empty
    job = await jobs.ended((await jobs.submit(ask())).id)
    assert job.error and "without a result" in job.error.message


async def test_a_client_that_leaves_does_not_take_its_job_along(
    jobs: Jobs, runtime: FakeVideoRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    inserting, insert = asyncio.Event(), JobStore.insert

    def watched(self: JobStore, job: Job) -> None:
        insert(self, job)
        loop.call_soon_threadsafe(inserting.set)

    monkeypatch.setattr(JobStore, "insert", watched)
    stage = Stage(runtime)
    submitting = asyncio.create_task(jobs.submit(ask(prompt="one")))
    await inserting.wait()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert await stage.begun() == "one"


async def test_jobs_are_listed_page_by_page(jobs: Jobs) -> None:
    ids = [(await jobs.submit(ask())).id for _ in range(5)]
    for job_id in ids[:4]:
        await jobs.ended(job_id)

    def pages(order: Any) -> Iterator[list[str]]:
        after, more = None, True
        while more:
            page, more = jobs.list(limit=2, after=after, order=order)
            after = page[-1].id
            yield [job.id for job in page]

    assert list(pages("asc")) == [ids[:2], ids[2:4], ids[4:]]
    assert list(pages("desc")) == [ids[4:2:-1], ids[2:0:-1], ids[:1]]
    assert jobs.list(limit=5, order="asc")[1] is False
    with pytest.raises(NotFound):
        jobs.list(after="video_0")


async def test_the_place_tells_when(
    engine: Engine, runtime: FakeVideoRuntime, clock: Clock
) -> None:
    stage = Stage(runtime)
    async with serving(engine, clock=clock, max_running=1) as jobs:
        first = await jobs.submit(ask(prompt="first"))
        await stage.begun()
        queued = [await jobs.submit(ask(prompt=prompt)) for prompt in ("a", "b", "c")]
        assert jobs.place(first.id) is None
        assert jobs.place(queued[2].id) == QueuePlace(2, None)  # nothing is known yet
        clock.now += 40.0
        stage.end("first")
        assert (await jobs.ended(first.id)).run_s == pytest.approx(40.0, abs=1.0)
        assert await stage.begun() == "a"
        place = jobs.place(queued[2].id)
        assert place and place.position == 1
        assert place.eta_s == pytest.approx(0.75 * 40 + 40 + 40, abs=3.0)  # a, b and c
        other = await jobs.submit(ask("other"))
        assert jobs.place(other.id) == QueuePlace(2, None)


async def test_unfinished_jobs_go_on_after_a_restart(
    runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    stage = Stage(runtime)
    pixels = np.random.default_rng(2).integers(0, 256, (48, 64, 3), np.uint8)
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        image = Image.fromarray(pixels)
        running = await jobs.submit(ask(prompt="running", image=image, seconds=2.0, fps=4))
        await stage.begun()
        queued = await jobs.submit(
            ask(prompt="queued", scheduling=SchedulingOptions(priority=Priority.NORMAL))
        )
        deleted = await jobs.submit(ask(prompt="deleted"))
        await jobs.delete(deleted.id)
    assert stage.closed == ["running"]
    with pytest.raises(Overloaded):
        jobs.get(running.id)
    runtime.answer = make
    runtime.requests.clear()
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        for job in (running, queued):
            ended = await jobs.ended(job.id)
            assert (ended.state, ended.attempts) == (JobState.COMPLETED, 1)
            assert ended.created_at == job.created_at
    first, second = sorted(runtime.requests, key=lambda request: request.prompt, reverse=True)
    assert first.request_id == running.id and second.request_id == queued.id
    assert (np.asarray(first.image) == pixels).all()
    assert (first.num_frames, first.fps, first.seed) == (8, 4, running.request["seed"])
    assert second.scheduling.priority is Priority.NORMAL


async def test_who_waits_for_a_job_is_told_when_jobs_stop(
    engine: Engine, runtime: FakeVideoRuntime
) -> None:
    stage = Stage(runtime)
    async with serving(engine) as jobs:
        job = await jobs.submit(ask())
        await stage.begun()
        waiting = asyncio.create_task(jobs.ended(job.id))
    with pytest.raises(Overloaded):
        async with asyncio.timeout(30):
            await waiting


async def test_jobs_told_to_stop_twice_stop_once(runtime: FakeVideoRuntime, tmp_path: Path) -> None:
    stage = Stage(runtime)
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        job = await jobs.submit(ask())
        await stage.begun()
        first, second = (asyncio.create_task(jobs.stop()) for _ in range(2))
        await second
        JobStore(tmp_path / "data").close()  # nobody else holds it any more
        await first
        assert stage.closed == ["a train"]
    runtime.answer = make
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        assert (await jobs.ended(job.id)).attempts == 1


async def test_an_engine_that_shuts_down_costs_no_attempt(
    runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    engine = video_engine(runtime, tmp_path)
    refused = asyncio.Event()

    async def cut_off(request: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.5)
        await engine.drain(0.0)
        refused.set()
        raise RuntimeFailed("cut off")

    runtime.answer = cut_off
    async with serving(engine, sleep=Naps()) as jobs:
        job = await jobs.submit(ask())
        await refused.wait()
        with pytest.raises(ShuttingDown):
            await jobs.submit(ask())
    runtime.answer = make
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        ended = await jobs.ended(job.id)
    assert (ended.state, ended.attempts) == (JobState.COMPLETED, 1)
    assert len(runtime.requests) == 2


async def test_expired_files_are_gone_and_the_record_says_so(
    jobs: Jobs, engine: Engine, clock: Clock
) -> None:
    job = await jobs.ended((await jobs.submit(ask())).id)
    path = jobs.content(job.id)
    clock.now += engine.config.max_data_age
    with pytest.raises(NotFound, match="expired"):
        jobs.content(job.id)
    other = await jobs.ended((await jobs.submit(ask())).id)  # a new output prunes the old
    assert jobs.content(other.id).is_file()
    assert not path.exists()
    assert jobs.get(job.id).expires_at == job.expires_at


async def test_outputs_beyond_the_limit_take_the_oldest_job_with_them(
    runtime: FakeVideoRuntime, tmp_path: Path, clock: Clock
) -> None:
    engine = video_engine(runtime, tmp_path, max_data=3000)
    async with serving(engine, clock=clock) as jobs:
        sizes: list[int] = []
        ids: list[str] = []
        while sum(sizes) <= 3000:
            job = await jobs.ended((await jobs.submit(ask())).id)
            ids.append(job.id)
            sizes.append(_nbytes(jobs, job.id))
            clock.now += 1.0
        with pytest.raises(NotFound, match="expired"):
            jobs.content(ids[0])
        assert jobs.content(ids[-1]).is_file()
        expires_at = jobs.get(ids[0]).expires_at
        assert expires_at is not None and expires_at <= clock.now


def _nbytes(jobs: Jobs, job_id: str) -> int:
    return sum(jobs.content(job_id, variant).stat().st_size for variant in ("video", "thumbnail"))


@pytest.mark.parametrize("damage", ["overwritten", "torn"])
async def test_a_damaged_database_is_reported_and_left_alone(
    runtime: FakeVideoRuntime, tmp_path: Path, damage: str
) -> None:
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        for _ in range(30):
            await jobs.submit(ask(prompt="p" * 2000))
    path = tmp_path / "data" / FILE_NAME
    data = path.read_bytes()
    if damage == "overwritten":
        path.write_bytes(b"not a database" * 100)
    else:
        path.write_bytes(data[:5000] + bytes(9000) + data[14000:])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"{FILE_NAME} cannot be used: .* left as it is"):
        async with serving(video_engine(runtime, tmp_path)):
            pass
    assert path.read_bytes() == before
    path.write_bytes(data)  # a backup helps, so nothing holds the file
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        assert len(jobs.list(limit=100)[0]) == 30


async def test_a_newer_database_is_refused(runtime: FakeVideoRuntime, tmp_path: Path) -> None:
    async with serving(video_engine(runtime, tmp_path)):
        pass
    connection = sqlite3.connect(tmp_path / "data" / FILE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        async with serving(video_engine(runtime, tmp_path)):
            pass


async def test_two_processes_do_not_share_their_jobs(
    jobs: Jobs, runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"another process.*engine\.data_dir .*ROUNDHOUSE_DATA_DIR"
    ):
        async with serving(video_engine(FakeVideoRuntime(), tmp_path)):
            pass
    assert (await jobs.ended((await jobs.submit(ask())).id)).state is JobState.COMPLETED


class Child:
    """`run_jobs.py` as a process of its own, killed at the end of the block at the latest."""

    def __init__(self, folder: Path, point: str, *prompts: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.jobs.run_jobs", str(folder), point, *prompts],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._unread: list[dict[str, Any]] = []

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def lines(self, kind: str, count: int) -> list[Any]:
        """The next `count` lines of a kind."""
        assert self._process.stdout is not None
        while sum(kind in line for line in self._unread) < count:
            text = self._process.stdout.readline()
            assert text, f"the process ended early: {self._process.wait()}"
            self._unread.append(json.loads(text))
        found = [line for line in self._unread if kind in line][:count]
        self._unread = [line for line in self._unread if line not in found]
        return [line[kind] for line in found]

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        assert self._process.wait(60) == -signal.SIGKILL

    def finish(self) -> None:
        assert self._process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("point", ["run", "half", "saved"])
def test_a_killed_process_loses_no_job(tmp_path: Path, point: str) -> None:
    with Child(tmp_path, point, "first", "second", "third") as child:
        ids = child.lines("submitted", 3)
        child.lines("reached", 1)
        child.kill()
    with Child(tmp_path, "none") as child:
        jobs = child.lines("ended", 3)
        child.finish()
    assert [job["id"] for job in jobs] == ids
    for seed, job in enumerate(jobs):
        assert (job["state"], job["error"]) == ("completed", None)
        shown = decoded(tmp_path / "data" / "outputs" / f"{job['id']}.mp4")
        asked = ask(seed=seed, num_frames=9, width=64, height=48)
        assert np.abs(shown.astype(int) - frames_of(asked)).max() <= 3
    names = {path.name for path in (tmp_path / "data" / "outputs").iterdir()}
    assert names == {f"{job_id}{suffix}" for job_id in ids for suffix in (".mp4", ".webp")}
    assert list((tmp_path / "data" / "jobs").iterdir()) == []
    assert jobs[0]["attempts"] == 2


@pytest.mark.slow
def test_a_job_that_kills_the_process_is_given_up_and_the_one_beside_it_is_not(
    tmp_path: Path,
) -> None:
    with Child(tmp_path, "run", "deadly", "harmless") as child:
        assert sorted(child.lines("reached", 2)) == ["deadly", "harmless"]
        child.kill()
    for _ in range(2):
        with Child(tmp_path, "run") as child:
            assert child.lines("reached", 1) == ["deadly"]
            child.kill()
    with Child(tmp_path, "none") as child:
        deadly, harmless = child.lines("ended", 2)
        child.finish()
    assert (deadly["state"], deadly["attempts"]) == ("failed", 3)
    assert deadly["error"]["message"] == "The process ended 3 times while this job ran."
    assert (harmless["state"], harmless["attempts"]) == ("completed", 2)


async def test_scheduling_options_of_a_job_outlive_a_restart(
    runtime: FakeVideoRuntime, tmp_path: Path
) -> None:
    stage = Stage(runtime)
    scheduling = SchedulingOptions(
        priority=Priority.NORMAL, keep_alive_s=float("inf"), no_evict=True
    )
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        job = await jobs.submit(ask(prompt="a", scheduling=scheduling))
        await stage.begun()
    runtime.answer = make
    runtime.requests.clear()
    async with serving(video_engine(runtime, tmp_path)) as jobs:
        assert (await jobs.ended(job.id)).state is JobState.COMPLETED
    (request,) = runtime.requests
    assert request.scheduling == replace(scheduling, timeout_s=float("inf"))


async def test_a_job_that_waits_too_long_fails(
    jobs: Jobs, runtime: FakeVideoRuntime, clock: Clock
) -> None:
    stage = Stage(runtime)
    await jobs.submit(ask(prompt="runs"))
    await stage.begun()
    # It is handed to the engine, but the model serves one at a time.
    late = await jobs.submit(ask(prompt="late", scheduling=SchedulingOptions(timeout_s=0.01)))
    clock.now += 1
    async with asyncio.timeout(30):
        ended = await jobs.ended(late.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None and ended.error.code == "queue_timeout"
    stage.end("runs")


async def test_a_job_for_a_loaded_model_only(jobs: Jobs, engine: Engine) -> None:
    scheduling = SchedulingOptions(if_loaded_only=True)
    with pytest.raises(NotLoaded):
        await jobs.submit(ask(scheduling=scheduling))
    assert jobs.list() == ([], False)
    await engine.load("film")
    job = await jobs.submit(ask(scheduling=scheduling))
    assert (await jobs.ended(job.id)).state is JobState.COMPLETED


def test_only_the_owner_may_read_the_jobs(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    try:
        files = [*tmp_path.glob("jobs*")]
        assert len(files) > 1
        assert [file.name for file in files if file.stat().st_mode & 0o077] == []
    finally:
        store.close()


def test_a_folder_in_the_place_of_the_jobs_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").mkdir()
    with pytest.raises(ConfigError, match=r"jobs\.sqlite3 cannot be used"):
        JobStore(tmp_path)
