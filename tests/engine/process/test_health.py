"""Faults behind the real interfaces: a device that fails or hangs, a run and a step that hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.errors import RuntimeFailed
from engine.process import health
from engine.process.gate import GATE
from engine.runtimes.common.thread_run import run_on_thread
from tests.server.fake import FakeDevice

HANG_S, STALL_S = 0.2, 60.0
TIMEOUT_S = 20.0


class SickDevice(FakeDevice):
    """Well until it is told what ails it."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.checked = threading.Semaphore(0)

    def check(self) -> None:
        assert not GATE.held
        self.checked.release()
        while not self.answers.is_set():
            pass  # as CUDA waits for a card: by spinning
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def watched(device: SickDevice) -> AsyncIterator[tuple[asyncio.Task[str], asyncio.Event]]:
    recheck = asyncio.Event()
    task = asyncio.create_task(health.wait_for_fault(device, recheck, HANG_S, STALL_S))
    try:
        yield task, recheck
    finally:
        device.answers.set()
        task.cancel()


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "POLL_INTERVAL_S", 0.02)


POISONED = "CUDA error: an illegal memory access was encountered"


async def test_a_poisoned_context_is_found_at_once_where_there_is_doubt() -> None:
    device = SickDevice()
    async with watched(device) as (fault, recheck):
        await asyncio.to_thread(device.checked.acquire)
        device.error = RuntimeError(f"{POISONED}\nCompile with TORCH_USE_CUDA_DSA")
        recheck.set()  # otherwise the next check is seconds away
        async with asyncio.timeout(health.CHECK_S / 2):
            assert await fault == f"the device does not work any more: {POISONED}"


async def test_and_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_S", 0.01)
    device = SickDevice()
    async with watched(device) as (fault, _):
        for _ in range(3):
            await asyncio.to_thread(device.checked.acquire)
        assert not fault.done()
        device.error = RuntimeError(POISONED)
        async with asyncio.timeout(TIMEOUT_S):
            assert POISONED in await fault


async def test_a_device_that_does_not_answer() -> None:
    device = SickDevice()
    device.answers.clear()
    async with watched(device) as (fault, _):
        async with asyncio.timeout(TIMEOUT_S):
            assert (await fault).startswith("a trivial call of the device hangs")


async def test_the_device_is_left_alone_inside_the_gate() -> None:
    device = SickDevice()
    with GATE.exclusive():
        async with watched(device) as (fault, _):
            await asyncio.wait([fault], timeout=2 * HANG_S)
            assert not fault.done() and not device.checked.acquire(blocking=False)


class HangingRun:
    """Waits at a call that does not return before the test ends."""

    progress = 0

    def __init__(self, called: threading.Event, end: threading.Event) -> None:
        self._called = called
        self._end = end

    def execute(self) -> None:
        with GATE.step():
            self._called.set()
            self._end.wait(TIMEOUT_S)

    def cancel(self) -> None:
        pass


async def test_a_run_that_hangs() -> None:
    called, end = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="small") as thread:
        events = run_on_thread(
            thread, lambda _: HangingRun(called, end), lambda error: RuntimeFailed(str(error))
        )
        run = asyncio.ensure_future(anext(events))
        async with watched(SickDevice()) as (fault, _), asyncio.timeout(TIMEOUT_S):
            assert (await fault).startswith("a run on small_0 hangs")
        end.set()
        with pytest.raises(StopAsyncIteration):
            await run


class HangingClient:
    """A core of vLLM whose step does not return before the test ends."""

    def __init__(self) -> None:
        self.end = threading.Event()

    def has_work(self) -> bool:
        return not self.end.is_set()

    def step(self) -> None:
        self.end.wait(TIMEOUT_S)


@pytest.mark.slow
async def test_a_step_of_vllm_that_hangs() -> None:
    from engine.runtimes.vllm.core_thread import CoreThread

    client: Any = HangingClient()
    cores = CoreThread()
    cores.attach(client)
    async with watched(SickDevice()) as (fault, _), asyncio.timeout(TIMEOUT_S):
        assert (await fault).startswith("a step of vLLM hangs")
    client.end.set()
    cores.stop()
