"""The fetcher over a hub on loopback, and an engine that asks it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.catalog.fetcher import AT_ONCE, Fetcher
from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import Conflict, EngineError, LoadFailed, NotFound, QueueTimeout, ShuttingDown
from engine.files.hub.cache import snapshot
from engine.files.hub.fetch import FetchProgress
from engine.memory.block import Estimate
from engine.runtimes.registry import REGISTRY
from engine.scheduling.deadline import Deadline
from engine.status import ModelState
from tests.engine.catalog.conftest import FILES, REPO, WEIGHTS, nothing_is_registered, partial
from tests.hub import Hub
from tests.server.fake import FakeRuntime, fake_engine

pytestmark = pytest.mark.slow  # requests to a hub

TIMEOUT_S = 30
HALF = len(WEIGHTS) // 2


class Reading(FakeRuntime):
    """Reads the files of `held` models when `may_read` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.read: list[str] = []

    def estimate(self, model: ModelConfig) -> Estimate:
        if model.id.startswith("held"):
            self.may_read.wait(TIMEOUT_S)
        self.read.append(model.id)
        return super().estimate(model)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> Reading:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    return Reading()


@pytest.fixture
def models() -> list[dict[str, Any]]:
    return [{"id": "small", "source": "none"}, {"id": "a", "source": REPO}]


@pytest_asyncio.fixture
async def engine(
    runtime: Reading, cache: Path, tmp_path: Path, models: list[dict[str, Any]]
) -> AsyncIterator[Engine]:
    configured = [{"runtime": "fake", **model} for model in models]
    engine = fake_engine(runtime, tmp_path / "state", models=configured, queue_timeout_s=20)
    await engine.start()
    yield engine
    runtime.may_read.set()
    await engine.stop()


@pytest.fixture
def fetcher(engine: Engine) -> Fetcher:
    return engine._fetcher


def a(engine: Engine) -> ModelConfig:
    return engine.config.find("a")


def within(seconds: float) -> Deadline:
    return Deadline(asyncio.get_running_loop().time, seconds)


async def pulled(engine: Engine, name: str = "a") -> list[FetchProgress]:
    async with asyncio.timeout(TIMEOUT_S):
        return [now async for now in engine.pull(name, 0.01)]


async def halfway(fetcher: Fetcher) -> None:
    """Wait until the hub has sent half of the weights and stalls."""
    async with asyncio.timeout(TIMEOUT_S):
        while "a" not in fetcher._fetches or fetcher._fetches["a"].progress.done_bytes < HALF:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class TestPull:
    async def test_followers_share_one_fetch(self, hub: Hub, engine: Engine) -> None:
        told = await asyncio.gather(pulled(engine), pulled(engine))
        assert hub.sent["model.safetensors"] == len(WEIGHTS)
        # By one fetch: to know what there is, and by the library as it registers the snapshot.
        assert hub.listed == [REPO, REPO]
        for each in told:
            assert each[-1].done_bytes == each[-1].total_bytes > len(WEIGHTS)

    async def test_the_last_follower_to_leave_stops_it(
        self, hub: Hub, cache: Path, engine: Engine, fetcher: Fetcher
    ) -> None:
        hub.stall["model.safetensors"] = HALF
        following = asyncio.create_task(pulled(engine))
        await halfway(fetcher)
        hub.let_go.set()
        following.cancel()
        await asyncio.wait([following])
        assert not fetcher._fetches
        assert partial(cache).stat().st_size == HALF
        assert nothing_is_registered(cache)

    async def test_a_request_that_joined_keeps_it(
        self, hub: Hub, engine: Engine, fetcher: Fetcher
    ) -> None:
        hub.stall["model.safetensors"] = HALF
        following = asyncio.create_task(pulled(engine))
        await halfway(fetcher)
        wanted = asyncio.create_task(fetcher.bring(a(engine), within(TIMEOUT_S)))
        while not fetcher._fetches["a"].wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.wait([following])
        hub.let_go.set()
        await wanted
        assert hub.sent["model.safetensors"] == len(WEIGHTS)

    @pytest.mark.parametrize("models", [[{"id": "a", "source": "me/nothing"}]])
    async def test_it_fails_for_all_who_follow(self, engine: Engine, fetcher: Fetcher) -> None:
        outcomes = await asyncio.gather(pulled(engine), pulled(engine), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NotFound, NotFound]
        assert not fetcher._fetches

    @pytest.mark.parametrize(
        "models",
        [
            [
                {"id": "a", "source": REPO},
                {"id": "b", "source": REPO, "options": {"nbytes": 2000}},
                {"id": "c", "source": "none"},
            ]
        ],
    )
    async def test_of_a_newer_commit_every_reader_is_told(
        self, hub: Hub, engine: Engine, runtime: Reading
    ) -> None:
        await engine.load("a")
        await engine.load("b")
        await engine.unload("b")
        assert not any(each.outdated for each in engine.status().models)
        await pulled(engine)  # the same commit
        assert not any(each.outdated for each in engine.status().models)
        assert runtime.read == ["a", "b"]
        hub.repos[REPO] = {**FILES, "config.json": b"{}"}
        await pulled(engine)
        found = {each.id: each for each in engine.status().models}
        assert [each.id for each in found.values() if each.outdated] == ["a"]
        assert found["a"].estimated_bytes is not None  # of what is loaded
        assert found["b"].estimated_bytes is None
        await engine.unload("a")
        assert not engine.model_status("a").outdated
        await engine.load("b")
        await engine.load("a")
        assert runtime.read == ["a", "b", "b", "a"]  # not what was remembered of the old ones


class TestBring:
    async def test_what_is_here_is_taken_and_no_hub_is_asked(
        self, hub: Hub, engine: Engine, fetcher: Fetcher
    ) -> None:
        await fetcher.bring(a(engine))
        asked = list(hub.listed)
        await fetcher.bring(a(engine))
        await fetcher.bring_again(a(engine))
        await engine.load("a")
        assert hub.listed == asked

    async def test_requests_share_one_fetch_and_it_outlives_them(
        self, hub: Hub, engine: Engine, fetcher: Fetcher
    ) -> None:
        hub.stall["model.safetensors"] = HALF
        with pytest.raises(QueueTimeout):
            await fetcher.bring(a(engine), within(0.5))
        waiting = [asyncio.create_task(engine.load("a")) for _ in range(3)]
        await halfway(fetcher)
        hub.let_go.set()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*waiting)
        assert hub.sent["model.safetensors"] == len(WEIGHTS)

    async def test_a_pull_of_newer_files_holds_no_request_up(
        self, hub: Hub, engine: Engine, fetcher: Fetcher
    ) -> None:
        await pulled(engine)
        hub.repos[REPO] = {**FILES, "model.safetensors": WEIGHTS[::-1]}
        hub.stall["model.safetensors"] = HALF
        fetcher._here.clear()  # as in a process that has just started
        following = asyncio.create_task(pulled(engine))
        await halfway(fetcher)
        async with asyncio.timeout(TIMEOUT_S):
            await engine.load("a")
        assert not following.done()
        hub.let_go.set()
        await following

    async def test_files_deleted_by_others_come_again_with_the_next_load(
        self, hub: Hub, cache: Path, engine: Engine
    ) -> None:
        await engine.load("a")
        await engine.unload("a")
        shutil.rmtree(cache)
        await engine.load("a")
        assert snapshot(REPO) is not None

    async def test_without_a_hub(
        self, hub: Hub, engine: Engine, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        with monkeypatch.context() as gone:
            gone.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            with pytest.raises(LoadFailed, match=f"^{REPO} cannot be fetched"):
                await fetcher.bring(a(engine))
        await fetcher.bring(a(engine))
        folder = snapshot(REPO)
        assert folder is not None
        (folder / "config.json").unlink()  # as a program leaves it that wanted the weights only
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        await fetcher.bring_again(a(engine))
        assert fetcher.has_files(a(engine))

    async def test_its_failure_is_the_reason_of_the_load(
        self, hub: Hub, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        del hub.repos[REPO]
        with pytest.raises(LoadFailed, match=f"^there is no repository {REPO}"):
            await engine.load("a")
        assert engine.model_status("a").state is ModelState.ABSENT


class TestThreads:
    @pytest.mark.parametrize(
        "models",
        [
            [
                *({"id": f"a{number}", "source": f"me/{number}"} for number in range(AT_ONCE)),
                *({"id": f"held{number}", "source": "none"} for number in range(40)),
                {"id": "late", "source": "me/late"},
                {"id": "small", "source": "none"},
            ]
        ],
    )
    async def test_fetches_and_readings_hold_nothing_else_up(
        self, hub: Hub, engine: Engine, models: list[dict[str, Any]]
    ) -> None:
        for model in models:
            if model["source"] != "none":
                hub.repos[model["source"]] = dict(FILES)
        hub.stall["model.safetensors"] = HALF  # the first of them
        slow = [each["id"] for each in models if each["id"] != "small"]
        waiting = [asyncio.create_task(engine.load(name)) for name in slow]
        await asyncio.sleep(0.2)
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.to_thread(lambda: None)
            await engine.load("small")
        assert not waiting[AT_ONCE].done()
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    @pytest.mark.parametrize("models", [[{"id": "held", "source": "none"}]])
    async def test_a_stop_waits_for_no_reading(self, engine: Engine) -> None:
        loading = asyncio.create_task(engine.load("held"))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(TIMEOUT_S / 3):
            await engine.stop()
        with pytest.raises(EngineError):
            await loading

    @pytest.mark.parametrize("models", [[{"id": "small", "source": "none"}]])
    async def test_a_stop_ends_what_no_thread_took(
        self, runtime: Reading, engine: Engine, fetcher: Fetcher
    ) -> None:
        for _ in range(2):
            fetcher._threads.submit(runtime.may_read.wait, TIMEOUT_S)
        loading = asyncio.create_task(engine.load("small"))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(TIMEOUT_S / 3):
            await engine.stop()
        with pytest.raises(EngineError):
            await loading

    async def test_a_stop_ends_a_fetch(
        self, hub: Hub, cache: Path, engine: Engine, fetcher: Fetcher
    ) -> None:
        hub.stall["model.safetensors"] = HALF
        loading = asyncio.create_task(engine.load("a"))
        await halfway(fetcher)
        async with asyncio.timeout(TIMEOUT_S / 3):
            await engine.stop()
            with pytest.raises(ShuttingDown):
                await loading
            hub.let_go.set()
            await asyncio.to_thread(fetcher._threads.shutdown)
        assert partial(cache).stat().st_size < len(WEIGHTS)
        assert nothing_is_registered(cache)
        with pytest.raises(ShuttingDown):
            await fetcher.bring(a(engine))


class TestRemove:
    def delete(self) -> int:
        self.began.set()
        assert self.may_end.wait(TIMEOUT_S)
        return 5

    @pytest.fixture(autouse=True)
    def events(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()

    async def test_what_is_fetched_or_waited_for_is_not_deleted(
        self, hub: Hub, engine: Engine, fetcher: Fetcher
    ) -> None:
        hub.stall["model.safetensors"] = HALF
        loading = asyncio.create_task(engine.load("a"))
        await halfway(fetcher)
        with pytest.raises(Conflict):
            await engine.remove_files("a", self.delete)
        hub.let_go.set()
        await loading
        with pytest.raises(Conflict, match="unload it first"):
            await engine.remove_files("a", self.delete)
        assert not self.began.is_set()

    async def test_a_request_meanwhile_fetches_them_again(
        self, hub: Hub, cache: Path, engine: Engine
    ) -> None:
        await pulled(engine)

        def delete() -> int:
            shutil.rmtree(cache)
            return self.delete()

        removing = asyncio.create_task(engine.remove_files("a", delete))
        await asyncio.to_thread(self.began.wait)
        with pytest.raises(Conflict):
            await engine.remove_files("a", delete)
        loading = asyncio.create_task(engine.load("a"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.shield(loading)
        assert not loading.done()
        assert "a" not in engine._fetcher._fetches
        self.may_end.set()
        assert await removing == 5
        await loading
        assert snapshot(REPO) is not None
