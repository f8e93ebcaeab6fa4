"""A run as its caller sees it: tried again when memory ran out, measured for the next one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from engine.admission import OUT_OF_MEMORY_FACTOR, WORKING_MARGIN
from engine.catalog import fetcher
from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import (
    LoadFailed,
    ModelNotFound,
    NotLoaded,
    OutOfDeviceMemory,
    QueueTimeout,
    RuntimeFailed,
)
from engine.events import Event, ImageResult, PartialImage, Progress, WorkingMemory
from engine.files.hub.selection import HubSource
from engine.memory.block import Estimate
from engine.process.switches import QUICK_SWITCH_S
from engine.requests import ImageOperation, ImageRequest, Request, SchedulingOptions
from engine.runtimes.base import Prepared
from engine.runtimes.registry import REGISTRY
from engine.scheduling.waiting import Stage, Waiting, WaitStatus
from engine.status import ModelState
from tests.engine.scheduling.world import Clock
from tests.server.fake import MODEL_BYTES, FakeDevice, FakeRuntime, fake_engine

PICTURE = Image.new("RGB", (2, 2))
RESULT = ImageResult((PICTURE,), seed=1)
ESTIMATE_BYTES = 100


class Measured(FakeRuntime):
    """A runtime whose runs have a shape, and that writes down what each was granted."""

    def prepare(self, model: Any, request: Request) -> Prepared:
        return Prepared(request, None, working_bytes=ESTIMATE_BYTES, shape="64x64")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> Measured:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    return Measured()


@pytest_asyncio.fixture
async def engine(runtime: Measured, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = fake_engine(runtime, tmp_path)
    await engine.start()
    yield engine
    await engine.stop()


def request() -> ImageRequest:
    return ImageRequest(model="small", operation=ImageOperation.GENERATION, request_id="test")


def granted_bytes(engine: Engine) -> list[int]:
    return [entry.nbytes for entry in engine.status().ledger.entries if entry.kind == "lease"]


async def events(engine: Engine) -> list[Event]:
    session = await engine.open(request())
    return [event async for event in session.events()]


@pytest.mark.parametrize("before", [[], [Progress(0.0), Progress(0.5)]])
async def test_a_run_that_ran_out_of_memory_is_tried_once_more_alone(
    engine: Engine, runtime: Measured, before: list[Event]
) -> None:
    exclusive: list[bool] = []

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        exclusive.append(any(lease.exclusive for lease in engine._scheduler._leases))
        if len(exclusive) == 1:
            for event in before:
                yield event
            raise OutOfDeviceMemory("too little")
        yield Progress(0.0)
        yield RESULT

    runtime.answer = answer
    assert await events(engine) == [*before, Progress(0.0), RESULT]
    assert len(exclusive) == 2
    assert granted_bytes(engine) == []


@pytest.mark.parametrize("given", [[], [PartialImage(0, PICTURE)]])
async def test_it_is_not_tried_a_third_time_nor_after_a_part_was_given(
    engine: Engine, runtime: Measured, given: list[Event]
) -> None:
    runs = 0

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        nonlocal runs
        runs += 1
        yield Progress(0.0)
        for event in given:
            yield event
        raise OutOfDeviceMemory("too little")

    runtime.answer = answer
    with pytest.raises(OutOfDeviceMemory):
        await events(engine)
    assert runs == (1 if given else 2)
    assert granted_bytes(engine) == []


async def test_a_measured_peak_is_what_the_next_run_is_granted(
    engine: Engine, runtime: Measured
) -> None:
    granted: list[int] = []

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        granted.extend(granted_bytes(engine))
        yield WorkingMemory(1000)
        yield RESULT

    runtime.answer = answer
    for _ in range(2):
        assert await events(engine) == [RESULT]
    assert granted == [ESTIMATE_BYTES, int(1000 * (1 + WORKING_MARGIN))]


async def test_a_shape_that_ran_out_is_granted_more(engine: Engine, runtime: Measured) -> None:
    granted: list[int] = []

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        granted.extend(granted_bytes(engine))
        if len(granted) == 1:
            raise OutOfDeviceMemory("too little")
        yield RESULT

    runtime.answer = answer
    assert await events(engine) == [RESULT]
    assert await events(engine) == [RESULT]
    more = int(int(ESTIMATE_BYTES * OUT_OF_MEMORY_FACTOR) * (1 + WORKING_MARGIN))
    assert granted == [ESTIMATE_BYTES, more, more]


async def test_what_a_run_takes_is_estimated_again_once_the_files_are_there(
    engine: Engine, runtime: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess for files that are not here may be far too high, and would be refused."""
    fetched: list[str] = []
    granted: list[int] = []

    def prepare(_model: Any, request: Request) -> Prepared:
        return Prepared(request, None, working_bytes=ESTIMATE_BYTES if fetched else 10**9)

    def pull(sources: Sequence[HubSource], *_: Any) -> None:
        fetched.extend(source.repo for source in sources)

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        granted.extend(granted_bytes(engine))
        yield RESULT

    monkeypatch.setattr(runtime, "prepare", prepare)
    monkeypatch.setattr(runtime, "hub_sources", lambda _: (HubSource("me/tiny", ("*",)),))
    monkeypatch.setattr(fetcher, "present", lambda _: Path() if fetched else None)
    monkeypatch.setattr(fetcher, "pull", pull)
    runtime.answer = answer
    for _ in range(2):
        assert await events(engine) == [RESULT]
    assert granted == [ESTIMATE_BYTES] * 2
    assert fetched == ["me/tiny"]


async def test_files_that_cannot_be_had_fail_the_load(
    engine: Engine, runtime: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(_model: Any) -> Estimate:
        raise LoadFailed("the hub is away")

    monkeypatch.setattr(runtime, "estimate", estimate)
    with pytest.raises(LoadFailed, match="the hub is away"):
        await events(engine)


async def test_the_peak_is_known_once_the_run_has_told_it(
    engine: Engine, runtime: Measured
) -> None:
    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.0)
        if len(runtime.requests) == 1:
            raise OutOfDeviceMemory("too little")
        yield WorkingMemory(1000)
        yield RESULT

    runtime.answer = answer
    session = await engine.open(request())
    assert session.notes.peak_bytes is None
    assert [event async for event in session.events()][-1] == RESULT
    assert session.notes.peak_bytes == 1000, "that of the second try was not taken over"


async def test_where_a_request_stands_can_be_seen(engine: Engine, runtime: Measured) -> None:
    ran, may_end = asyncio.Event(), asyncio.Event()

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        ran.set()
        await may_end.wait()
        yield RESULT

    runtime.answer = answer
    first, second = Waiting(), Waiting()
    assert engine.wait_status(first) == WaitStatus(Stage.STARTING)
    opening = [asyncio.create_task(engine.open(request(), first))]
    await ran.wait()
    assert engine.wait_status(first) == WaitStatus(Stage.RUNNING)
    opening.append(asyncio.create_task(engine.open(request(), second)))
    await asyncio.sleep(0)  # it runs until it waits for the one place
    status = engine.wait_status(second)
    assert (status.stage, status.position) == (Stage.QUEUED, 1)
    may_end.set()
    for session in await asyncio.gather(opening[0]):
        await session.close()
    await (await opening[1]).close()
    assert engine.wait_status(second) == WaitStatus(Stage.RUNNING)


async def test_one_deadline_covers_all_the_waits_of_a_request(
    runtime: Measured, tmp_path: Path
) -> None:
    clock = Clock()
    config = fake_engine(runtime, tmp_path).config
    engine = Engine(config, device=FakeDevice(), runtimes={"fake": lambda _: runtime}, clock=clock)
    patient = replace(request(), scheduling=SchedulingOptions(timeout_s=1.0))
    estimates = runtime.estimate

    fetched = False

    def estimate(model: ModelConfig) -> Estimate:
        nonlocal fetched
        clock.now += 0.0 if fetched else 0.25
        fetched = True
        return estimates(model)

    runtime.estimate = estimate  # type: ignore[method-assign]
    ran = 0

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        nonlocal ran
        ran += 1
        clock.now += 100.0  # how long a run takes is another matter
        raise OutOfDeviceMemory("too little")
        yield RESULT

    runtime.answer = answer
    opening = asyncio.create_task(engine.open(patient))
    await asyncio.sleep(0)
    clock.now += 0.25
    granting = engine._scheduler._grant
    engine._scheduler._grant = lambda serial: None  # type: ignore[method-assign]
    await engine.start()
    engine._scheduler._exclusive_running = True  # nothing is granted for now
    engine._scheduler._grant = granting  # type: ignore[method-assign]

    async def until(ready: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not ready():
                await asyncio.wait([opening], timeout=0.01)
                assert not opening.done()

    async def queued() -> float:
        await until(engine._scheduler._queue.views)
        return engine._scheduler._queue.views()[0].deadline - clock.now

    assert await queued() == pytest.approx(0.5)
    clock.now += 0.25
    held = engine._scheduler._grant  # the second try must wait as well

    def grant(serial: int) -> None:
        held(serial)
        engine._scheduler._exclusive_running = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._scheduler, "_grant", grant)
        engine._scheduler._exclusive_running = False
        engine._scheduler.on_timer()
        await until(lambda: ran)
    assert await queued() == pytest.approx(0.25)
    clock.now += 0.25
    engine._scheduler.on_timer()
    with pytest.raises(QueueTimeout, match="within 1 s"):
        await opening
    await engine.stop()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_run_ends_at_its_own_pace_whoever_reads(
    engine: Engine, runtime: Measured, fails: bool
) -> None:
    events = [PartialImage(number, PICTURE) for number in range(50)]
    ended = asyncio.Event()

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        try:
            for event in events:
                await asyncio.sleep(0)
                yield event
            if fails:
                raise RuntimeFailed("part-way")
            yield RESULT
        finally:
            ended.set()

    runtime.answer = answer
    session = await engine.open(request())
    async with aclosing(session.events()) as running:
        got = [await anext(running)]  # and now the reader is busy with it
        async with asyncio.timeout(10):
            await ended.wait()
            assert session._run._ahead is not None
            await asyncio.wait([session._run._ahead])
        assert engine.model_status("small").leases == 0
        if fails:
            with pytest.raises(RuntimeFailed, match="part-way"):
                async for event in running:
                    got.append(event)
            assert got == events
        else:
            got += [event async for event in running]
            assert got == [*events, RESULT]


async def test_a_run_gives_its_lease_back_with_its_last_event_read(
    engine: Engine, runtime: Measured
) -> None:
    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.5)
        yield RESULT

    runtime.answer = answer
    session = await engine.open(request())
    running = session.events()
    assert [event async for event in running] == [Progress(0.5), RESULT]
    assert engine.model_status("small").leases == 0


async def test_what_is_read_ahead_is_stopped_when_the_reader_leaves(
    engine: Engine, runtime: Measured
) -> None:
    going, closed = asyncio.Event(), asyncio.Event()

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        try:
            yield Progress(0.0)
            going.set()
            await asyncio.Event().wait()
        finally:
            assert engine.model_status("small").leases == 1
            closed.set()

    runtime.answer = answer
    session = await engine.open(request())
    running = session.events()
    await anext(running)
    async with asyncio.timeout(10):
        await going.wait()  # nobody has asked for the second event
        await running.aclose()
    assert closed.is_set()
    assert engine.model_status("small").leases == 0


async def test_running_out_of_memory_is_tried_again_also_where_the_reader_is_slow(
    engine: Engine, runtime: Measured
) -> None:
    failed = asyncio.Event()

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        yield Progress(0.0)
        if not failed.is_set():
            failed.set()
            raise OutOfDeviceMemory("too little")
        yield RESULT

    runtime.answer = answer
    session = await engine.open(request())
    running = session.events()
    got = [await anext(running)]
    async with asyncio.timeout(10):
        await failed.wait()
    got += [event async for event in running]
    assert got == [Progress(0.0), Progress(0.0), RESULT]
    assert granted_bytes(engine) == []


async def test_an_error_of_a_library_does_not_hide_a_cancellation(
    engine: Engine, runtime: Measured
) -> None:
    running = asyncio.Event()

    async def answer(_: Any) -> AsyncGenerator[Event, None]:
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeFailed("the client has left") from None
        yield RESULT

    runtime.answer = answer
    opening = asyncio.create_task(engine.open(request()))
    await running.wait()
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert engine.model_status("small").leases == 0


async def test_a_run_whose_end_fails_gives_its_lease_back(
    engine: Engine, runtime: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stubborn:
        async def __anext__(self) -> Event:
            raise RuntimeFailed("at the beginning")

        async def aclose(self) -> None:
            raise RuntimeFailed("at the end")

    await engine.load("small")
    loaded: Any = engine._residency.loaded["small"]
    loaded.run = lambda _: Stubborn()
    monkeypatch.setattr(runtime, "prepare", lambda _, request: Prepared(request, None))
    with pytest.raises(RuntimeFailed, match="at the end"):
        await engine.open(request())
    assert engine.model_status("small").leases == 0


async def test_a_plan_changes_nothing(engine: Engine) -> None:
    plan = await engine.plan("gpt-4o", working_bytes=50)
    assert (plan.model, plan.fits, plan.wanted_bytes) == ("small", True, MODEL_BYTES + 50)
    assert engine.model_status("small").state is ModelState.ABSENT
    with pytest.raises(ModelNotFound):
        await engine.plan("nobody")


async def test_a_plan_for_files_that_cannot_be_read_says_why(
    engine: Engine, runtime: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(_model: Any) -> Estimate:
        raise LoadFailed("the hub is away")

    monkeypatch.setattr(runtime, "estimate", estimate)
    with pytest.raises(LoadFailed, match="the hub is away"):
        await engine.plan("small")
    with pytest.raises(NotLoaded) as caught:
        await engine.check_loaded("small")
    assert (caught.value.tier, caught.value.load_s) == ("disk", None)


async def test_a_load_lets_steps_have_the_interpreter_quickly(
    engine: Engine, runtime: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = runtime.load
    seen: list[float] = []

    async def watched(*arguments: Any) -> Any:
        seen.append(sys.getswitchinterval())
        return await load(*arguments)

    monkeypatch.setattr(runtime, "load", watched)
    await engine.load("small")
    assert seen == [pytest.approx(QUICK_SWITCH_S)]
