"""A bug of ours is a fault of the process: seen by the health check, told to who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import EngineError, Overloaded
from engine.memory.block import Block
from engine.process import health
from engine.process.faults import FAULTS
from engine.runtimes.base import LoadedModel
from engine.runtimes.registry import REGISTRY
from engine.status import ModelState
from tests.server.fake import FakeLoaded, FakeRuntime, fake_engine

BUG = AssertionError("a library that changed its mind")


class Parkable(FakeLoaded):
    """A model whose weights can leave the device while it stays loaded."""

    def blocks(self) -> tuple[Block, ...]:
        return (Block("weights", 1000, parkable=True),)


class ParkableRuntime(FakeRuntime):
    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        return Parkable(model, self)

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        pass

    async def wake(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        pass


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> None:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    monkeypatch.setattr(health, "POLL_INTERVAL_S", 0.02)


@pytest.fixture
def runtime() -> ParkableRuntime:
    return ParkableRuntime()


@pytest_asyncio.fixture
async def engine(runtime: ParkableRuntime, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = fake_engine(runtime, tmp_path)
    await engine.start()
    yield engine
    await engine.stop()


async def ends_by_a_bug(engine: Engine, work: Awaitable[None]) -> EngineError:
    """The error that `work` gets; the health check must see the bug too."""
    async with asyncio.timeout(5):
        with pytest.raises(EngineError) as raised:
            await work
        assert str(BUG) in await engine.wait_for_fault(10, 10)
    FAULTS.clear()
    return raised.value


async def test_a_load_that_ends_by_a_bug_is_told_to_all_who_wait(
    engine: Engine, runtime: ParkableRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(_: Parkable) -> tuple[Block, ...]:
        raise BUG

    with monkeypatch.context() as patch:
        patch.setattr(Parkable, "blocks", blocks)
        asked = [asyncio.create_task(engine.load("small")) for _ in range(3)]
        assert isinstance(await ends_by_a_bug(engine, asked[0]), Overloaded)
        for each in asked[1:]:
            with pytest.raises(Overloaded):
                await each
    assert engine.model_status("small").state is ModelState.ABSENT
    assert engine.status().ledger.granted_bytes == 0
    await engine.load("other")  # nobody is held up by it
    await engine.load("small")


async def test_an_estimate_that_ends_by_a_bug_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_estimate(*_: Any) -> None:
        raise BUG

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "on_estimate", on_estimate)
        await ends_by_a_bug(engine, engine.load("small"))
    await engine.load("small")


async def test_a_wake_that_ends_by_a_bug_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_woken(*_: Any) -> None:
        raise BUG

    await engine.load("small")
    await engine.park("small")
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "on_woken", on_woken)
        await ends_by_a_bug(engine, engine.load("small"))
    assert engine.status().ledger.granted_bytes == 0
    await engine.load("small")


@pytest.mark.parametrize(("order", "event"), [("park", "on_parked"), ("unload", "on_unloaded")])
async def test_an_order_that_ends_by_a_bug_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, order: str, event: str
) -> None:
    def bug(*_: Any) -> None:
        raise BUG

    await engine.load("small")
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, event, bug)
        async with asyncio.timeout(5):
            await getattr(engine, order)("small")  # its bytes are free
            assert str(BUG) in await engine.wait_for_fault(10, 10)
    FAULTS.clear()
    assert engine.model_status("small").state is ModelState.ABSENT
    assert engine.status().ledger.granted_bytes == 0
    await engine.load("small")


async def test_a_library_that_cancels_itself_leaves_no_model_behind(
    engine: Engine, runtime: ParkableRuntime
) -> None:
    async def load(model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        raise asyncio.CancelledError  # as of a future whose executor was shut down

    runtime.load = load  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        with pytest.raises(Overloaded):
            await engine.load("small")
    assert engine.model_status("small").state is ModelState.ABSENT
    FAULTS.clear()


async def test_a_model_that_is_loaded_stays_though_it_cannot_be_noted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*_: Any) -> None:
        raise BUG

    estimates: Any = engine._residency._estimates
    monkeypatch.setattr(estimates, "put", put)
    await engine.load("small")
    assert engine.model_status("small").state is ModelState.RESIDENT


async def test_a_bug_of_the_planner_is_a_fault(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any) -> None:
        raise BUG

    with monkeypatch.context() as patch:
        patch.setattr("engine.scheduling.scheduler.plan", plan)
        with pytest.raises(AssertionError):
            await engine.load("small")
        async with asyncio.timeout(5):
            assert str(BUG) in await engine.wait_for_fault(10, 10)
    FAULTS.clear()
