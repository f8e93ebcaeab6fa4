"""The watchdog by a clock and processor times of the test's own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.process.gate import Gate
from engine.process.watchdog import MAX_INTERVAL_S, SystemUsage, Watchdog

HANG_S, STALL_S = 10.0, 900.0


class FakeUsage:
    def __init__(self) -> None:
        self.thread = self.process = self.children = 0.0
        self.disk = False

    def thread_s(self, native_id: int) -> float:
        return self.thread

    def waits_for_disk(self, native_id: int) -> bool:
        return self.disk

    def process_s(self) -> float:
        return self.process

    def children_s(self) -> float:
        return self.children


class Counted:
    progress = 0


class World:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.gate = Gate()
        self.usage = FakeUsage()
        self.dog = Watchdog(self.gate, lambda: self.now_s, self.usage)

    def look(self) -> str | None:
        return self.dog.check(HANG_S, STALL_S)

    def found_after(self, limit_s: float, **used_per_s: float) -> float | None:
        """Seconds until something is found to hang, looking once a second; None: nothing is."""
        began_s = self.now_s
        while self.now_s - began_s < limit_s:
            if self.look() is not None:
                return self.now_s - began_s
            self.now_s += 1.0
            for name, seconds in used_per_s.items():
                setattr(self.usage, name, getattr(self.usage, name) + seconds)
        return None


@pytest.fixture
def world() -> World:
    return World()


def near(seconds: float | None, expected_s: float) -> bool:
    return seconds is not None and expected_s < seconds <= expected_s + 3


def test_nothing_under_way(world: World) -> None:
    with world.dog.watch("a run"):
        pass
    assert world.found_after(10 * STALL_S) is None


def test_a_call_that_waits_for_what_never_comes(world: World) -> None:
    with world.dog.watch("a run on small"):
        assert near(world.found_after(60), HANG_S)
        assert str(world.look()).startswith("a run on small hangs: it has got no further for 1")
    assert world.look() is None, "it has ended"


@pytest.mark.parametrize("who", ["thread", "children"])
def test_one_that_computes_or_compiles_has_longer(world: World, who: str) -> None:
    with world.dog.watch("a run"):
        assert near(world.found_after(2 * STALL_S, **{who: 0.5}), STALL_S)


def test_one_that_waits_for_a_disk_has_longer(world: World) -> None:
    world.usage.disk = True
    with world.dog.watch("a run"):
        assert near(world.found_after(2 * STALL_S), STALL_S)


def test_others_that_compute_do_not_excuse_it(world: World) -> None:
    with world.dog.watch("a run"):
        assert near(world.found_after(60, process=2.0), HANG_S)


def test_helpers_do(world: World) -> None:
    with world.dog.watch("a run", helpers=True):
        assert near(world.found_after(2 * STALL_S, process=1.0), STALL_S)
    with world.dog.watch("a run", helpers=True):
        assert near(world.found_after(60, thread=1.0), HANG_S)


def test_a_trivial_call_may_not_even_compute(world: World) -> None:
    with world.dog.watch("a trivial call", computes=False):
        assert near(world.found_after(60, thread=1.0, process=1.0), HANG_S)


def test_one_that_gets_on(world: World) -> None:
    work = Counted()
    with world.dog.watch("a run", work):
        for _ in range(10):
            assert world.found_after(HANG_S - 2) is None
            work.progress += 1
        assert near(world.found_after(60), HANG_S)


def test_a_process_that_stood_still_gets_no_blame(world: World) -> None:
    with world.dog.watch("a run"):
        for _ in range(int(HANG_S / MAX_INTERVAL_S)):
            assert world.look() is None
            world.now_s += 1e6


@contextmanager
def held(gate: Gate) -> Iterator[None]:
    """Another thread holds the gate."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with gate.exclusive():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_who_waits_at_the_gate_does_not_hang(world: World) -> None:
    begun = threading.Event()

    def step() -> None:
        with world.dog.watch("a step"):
            begun.set()
            with world.gate.step():
                pass

    thread = threading.Thread(target=step)
    with held(world.gate):
        thread.start()
        assert begun.wait(30)
        while not world.gate.waits(thread.ident or 0):
            pass
        assert world.found_after(STALL_S / 2) is None
    thread.join()
    assert not world.gate.waits(thread.ident or 0)


def test_a_load_that_never_ends(world: World) -> None:
    with held(world.gate):
        assert near(world.found_after(2 * STALL_S), STALL_S)
        assert str(world.look()).startswith("a load hangs")
    assert world.look() is None


def test_many_loads_are_no_long_one(world: World) -> None:
    for _ in range(4):
        with held(world.gate):
            assert world.found_after(STALL_S / 2) is None


def test_the_system_tells_work_from_waiting() -> None:
    usage, waiting = SystemUsage(), threading.Event()
    ids: list[int] = []

    def wait() -> None:
        ids.append(threading.get_native_id())
        waiting.wait(30)

    thread = threading.Thread(target=wait)
    thread.start()
    me = threading.get_native_id()
    began_s, deadline_s = usage.thread_s(me), time.monotonic() + 30
    while usage.thread_s(me) < began_s + 0.2:
        assert time.monotonic() < deadline_s
    assert usage.thread_s(ids[0]) < 0.1
    assert usage.process_s() >= 0.2
    assert not usage.waits_for_disk(ids[0])
    waiting.set()
    thread.join()
    assert usage.thread_s(ids[0]) == 0.0, "a thread that has ended"


def test_the_system_counts_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline_s = time.monotonic() + 30
        while SystemUsage().children_s() < 0.1:
            assert time.monotonic() < deadline_s
    finally:
        child.kill()
        child.wait()
