"""The one thread that steps every core: what happens when a bug ends it, and after its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine.process.faults import FAULTS
from engine.runtimes.vllm.runtime import VllmRuntime

if TYPE_CHECKING:
    from engine.runtimes.vllm.core_client import CoreClient
    from engine.runtimes.vllm.core_thread import CoreThread

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

WAIT_S = 20.0
BUG = KeyError("a request that nobody knows")


class Core:
    """A core without work, of which each method may be replaced."""

    def __init__(self, *_: Any) -> None:
        self.batch_queue = None
        self.scheduler = SimpleNamespace(has_requests=lambda: False)

    def abort_requests(self, ids: list[str]) -> None:
        raise BUG

    def shutdown(self) -> None:
        pass

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)


MakeClient = Callable[[], "CoreClient"]


@pytest_asyncio.fixture(loop_scope="session")
async def cores(vllm_runtime: VllmRuntime) -> AsyncIterator[CoreThread]:
    from engine.runtimes.vllm.core_thread import CoreThread

    cores = CoreThread()
    yield cores
    cores.stop()
    FAULTS.clear()


@pytest.fixture
def make_client(cores: CoreThread, monkeypatch: pytest.MonkeyPatch) -> MakeClient:
    from engine.runtimes.vllm import core_client

    monkeypatch.setattr(core_client, "EngineCore", Core)

    def make() -> CoreClient:
        client = core_client.CoreClient(cores, None, None, log_stats=False)
        client.connect(asyncio.get_running_loop())
        return client

    return make


async def tasks(client: CoreClient) -> Any:
    async with asyncio.timeout(WAIT_S):
        return await client.get_supported_tasks_async()


async def test_a_bug_in_an_abort_is_told_to_all_models_and_to_the_health_check(
    cores: CoreThread, make_client: MakeClient
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    clients = [make_client(), make_client()]
    told: list[BaseException] = []
    for client in clients:
        client.on_failure = told.append
    assert await tasks(clients[1]) == ("generate",)
    await clients[0].abort_requests_async(["chatcmpl-1"])
    for client in clients:
        with pytest.raises(EngineDeadError):
            async with asyncio.timeout(WAIT_S):
                await client.get_output_async()
        assert client.error is BUG
        assert client.resources.engine_dead
        assert not client.has_work()
    assert told == [BUG, BUG]
    assert FAULTS.first is not None
    assert "a request that nobody knows" in FAULTS.first


async def test_calls_that_a_dead_thread_does_not_get_to_are_answered(
    cores: CoreThread, make_client: MakeClient
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    client = make_client()
    may_die = threading.Event()

    def die() -> None:
        may_die.wait(WAIT_S)
        raise BUG

    cores.post(die)
    waiting = asyncio.create_task(tasks(client))
    await asyncio.sleep(0)
    may_die.set()
    with pytest.raises(EngineDeadError):
        await waiting


async def test_nothing_waits_for_a_thread_that_has_ended(
    cores: CoreThread, make_client: MakeClient
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    from engine.runtimes.vllm.core_thread import CoreThreadEnded

    client = make_client()
    cores.stop()
    with pytest.raises(EngineDeadError):
        await tasks(client)
    with pytest.raises(EngineDeadError):
        await client.add_request_async(SimpleNamespace(request_id="late"))
    await client.abort_requests_async(["late"])
    with pytest.raises(CoreThreadEnded):
        make_client()
    await asyncio.to_thread(client.shutdown)


async def test_a_caller_that_leaves_before_its_call_is_no_bug(
    cores: CoreThread, make_client: MakeClient
) -> None:
    client = make_client()
    may_go_on = threading.Event()

    def hold() -> None:
        may_go_on.wait(WAIT_S)

    cores.post(hold)
    leaving = asyncio.create_task(tasks(client))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    may_go_on.set()
    assert await tasks(client) == ("generate",)
    assert FAULTS.first is None
