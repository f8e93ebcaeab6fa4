"""Orders of an administrator, as the engine answers them: each ends, whatever comes between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import Conflict, EngineError, LoadFailed, ModelNotFound
from engine.memory.block import Block
from engine.runtimes.base import LoadedModel
from engine.runtimes.registry import REGISTRY
from engine.status import ModelState
from tests.server.fake import FakeLoaded, FakeRuntime, fake_engine

DRAIN_S = 20.0
WAIT_S = 10.0


class Parkable(FakeLoaded):
    def blocks(self) -> tuple[Block, ...]:
        return (Block("weights", 1000, parkable=True),)


class Stoppable(FakeRuntime):
    """Loads of `other` wait until they may go on, and then fail if they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.loading = asyncio.Event()
        self.may_load = asyncio.Event()
        self.error: EngineError | None = None

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        if model.id == "other":
            self.loading.set()
            await self.may_load.wait()
        if self.error is not None:
            raise self.error
        return Parkable(model, self)

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        pass


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> Stoppable:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    return Stoppable()


@pytest_asyncio.fixture
async def engine(runtime: Stoppable, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = fake_engine(runtime, tmp_path)
    await engine.start()
    yield engine
    runtime.may_load.set()
    await engine.stop()


async def test_a_session_is_one_lease_of_several_models(engine: Engine, runtime: Stoppable) -> None:
    runtime.may_load.set()
    ids = [model.id for model in engine.config.models][:2]
    planned = await engine.plan(ids[0], further_models=ids[1:])
    assert planned.further_models == (ids[1],)
    assert planned.fits
    with await engine.hold([*ids, ids[0]], request_id="s") as lease:
        assert lease.models == tuple(ids)
        assert [engine.model_status(each).holds for each in ids] == [1, 1]
        with pytest.raises(Conflict, match="kept by 1 sessions"):
            await engine.park(ids[1])
    assert [engine.model_status(each).holds for each in ids] == [0, 0]
    with pytest.raises(ModelNotFound):
        await engine.hold([ids[0], "none"], request_id="s")


async def test_a_drain_ends_with_a_load_that_fails(engine: Engine, runtime: Stoppable) -> None:
    loading = asyncio.create_task(engine.load("other"))
    await runtime.loading.wait()
    draining = asyncio.create_task(engine.drain(DRAIN_S))
    runtime.error = LoadFailed("torn")
    runtime.may_load.set()
    async with asyncio.timeout(DRAIN_S / 2):
        await draining
    with pytest.raises(EngineError):
        await loading


@pytest.mark.parametrize("order", ["park", "unload"])
async def test_an_order_is_answered_though_the_model_is_pinned_meanwhile(
    engine: Engine, runtime: Stoppable, order: str
) -> None:
    await engine.load("small")
    loading = asyncio.create_task(engine.load("other"))  # a transition is under way
    await runtime.loading.wait()
    ordered = asyncio.create_task(getattr(engine, order)("small"))
    await asyncio.sleep(0)
    engine.pin("small")
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(Conflict, match="pinned"):
            await ordered
    runtime.may_load.set()
    await loading
    assert engine.model_status("small").state is ModelState.RESIDENT


async def test_an_order_is_carried_out_after_the_transition_under_way(
    engine: Engine, runtime: Stoppable
) -> None:
    await engine.load("small")
    loading = asyncio.create_task(engine.load("other"))
    await runtime.loading.wait()
    ordered = asyncio.create_task(engine.park("small"))
    await asyncio.sleep(0)
    assert not ordered.done()
    runtime.may_load.set()
    await loading
    async with asyncio.timeout(WAIT_S):
        await ordered
    assert engine.model_status("small").state is ModelState.PARKED
