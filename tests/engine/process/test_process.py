"""The gate: who may touch what the process shares."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.process.gate import GATE, HOLD_S, Gate
from engine.process.heap import freeze_heap, thaw_heap, uncollected
from engine.process.switches import QUICK_SWITCH_S, quick_switches
from engine.process.torch_state import share_torch_state
from engine.runtimes.common.thread_run import run_on_thread
from engine.runtimes.common.torch_errors import torch_error
from engine.runtimes.registry import REGISTRY
from tests.server.fake import FakeRuntime, fake_engine

WAIT_S = 10.0
"""Long enough never to pass on a healthy machine; every wait ends by an event."""


def run(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.fixture
def variable() -> dict[str, str]:
    return {"value": "usual"}


@pytest.fixture
def gate(variable: dict[str, str]) -> Gate:
    gate = Gate()
    gate.state.register(
        "variable",
        lambda: variable["value"],
        lambda value: variable.__setitem__("value", value),
    )
    return gate


def test_steps_run_beside_each_other(gate: Gate) -> None:
    both_inside = threading.Barrier(2)

    def step() -> None:
        with gate.step():
            both_inside.wait(WAIT_S)

    finish(run(step), run(step))
    assert not both_inside.broken


def test_no_step_runs_beside_exclusive_work(gate: Gate) -> None:
    log: list[str] = []
    asked = threading.Event()

    def step() -> None:
        asked.set()
        with gate.step():
            log.append("step")

    with gate.exclusive():
        thread = run(step)
        assert asked.wait(WAIT_S)
        thread.join(0.05)  # a step that is let in wrongly would end at once
        log.append("exclusive")
    finish(thread)
    assert log == ["exclusive", "step"]


def test_exclusive_work_waits_for_steps_under_way(gate: Gate) -> None:
    inside, leave = threading.Event(), threading.Event()
    log: list[str] = []

    def step() -> None:
        with gate.step():
            inside.set()
            assert leave.wait(WAIT_S)
            log.append("step")

    def exclusive() -> None:
        with gate.exclusive():
            log.append("exclusive")

    stepping = run(step)
    assert inside.wait(WAIT_S)
    waiting = run(exclusive)
    waiting.join(0.05)
    leave.set()
    finish(stepping, waiting)
    assert log == ["step", "exclusive"]


def wait_until(condition: Callable[[], bool], gate: Gate) -> None:
    """Wait for another thread to reach the gate; the gate tells of every change itself."""
    deadline = threading.Event()
    timer = threading.Timer(WAIT_S, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set()
            deadline.wait(0.001)
    finally:
        timer.cancel()


def test_exclusive_work_lets_a_waiting_step_through_once_it_has_held_long_enough() -> None:
    """Too early would cost a hand-off at every tensor, never would hold up every stream."""
    log: list[str] = []
    now_s = 0.0
    gate = Gate(clock=lambda: now_s)

    def step() -> None:
        with gate.step():
            log.append("step")

    with gate.exclusive():
        thread = run(step)
        wait_until(lambda: gate._steps_waiting == 1, gate)
        now_s += HOLD_S / 2
        gate.breathe()
        log.append("too early")
        now_s += HOLD_S
        gate.breathe()
        log.append("after")
        second = run(step)
        wait_until(lambda: gate._steps_waiting == 1, gate)
        now_s += HOLD_S / 2
        gate.breathe()
        log.append("the time counts from the last turn")
    finish(thread, second)
    assert log == ["too early", "step", "after", "the time counts from the last turn", "step"]


@pytest.mark.slow
def test_a_module_under_construction_lets_steps_through() -> None:
    from torch import nn

    now_s = 0.0
    gate = Gate(clock=lambda: now_s)
    share_torch_state(gate)
    stepped = threading.Event()

    def step() -> None:
        with gate.step():
            stepped.set()

    with gate.exclusive():
        thread = run(step)
        wait_until(lambda: gate._steps_waiting == 1, gate)
        now_s += 2 * HOLD_S
        assert not stepped.is_set()
        nn.Sequential(nn.Linear(1, 1))
        assert stepped.is_set()
    finish(thread)


def test_a_long_step_lets_exclusive_work_through_when_it_pauses(gate: Gate) -> None:
    log: list[str] = []
    with gate.step():
        gate.pause()  # nobody waits
        waiting = run(lambda: exclusively(gate, lambda: log.append("exclusive")))
        wait_until(lambda: gate.exclusive_waiting == 1, gate)
        log.append("first part")
        gate.pause()
        log.append("second part")
    finish(waiting)
    assert log == ["first part", "exclusive", "second part"]


def test_no_other_exclusive_work_begins_while_the_first_has_yielded(gate: Gate) -> None:
    """A library's patches to build a module are no state that could be put back."""
    log: list[str] = []
    with gate.exclusive():
        with gate.yielded():
            other = run(lambda: exclusively(gate, lambda: log.append("other")))
            other.join(0.05)  # let in wrongly, it would end at once
            with gate.step():  # and it does not hold up steps meanwhile
                log.append("step")
        log.append("first")
    finish(other)
    assert log == ["step", "first", "other"]


def test_exclusive_work_in_a_step_is_an_error_not_a_deadlock(gate: Gate) -> None:
    with gate.step(), pytest.raises(RuntimeError), gate.exclusive():
        pass
    exclusively(gate, lambda: None)


def exclusively(gate: Gate, work: Callable[[], None]) -> None:
    with gate.exclusive():
        work()


def test_breathing_outside_of_exclusive_work_does_nothing(gate: Gate) -> None:
    gate.breathe()
    with gate.step():
        gate.breathe()


def test_exclusive_work_is_not_starved_by_steps(gate: Gate) -> None:
    stop = threading.Event()

    def step_for_ever() -> None:
        while not stop.is_set():
            with gate.step():
                pass

    threads = [run(step_for_ever) for _ in range(3)]
    done = threading.Event()

    def exclusive() -> None:
        with gate.exclusive():
            done.set()

    threads.append(run(exclusive))
    try:
        assert done.wait(WAIT_S)
    finally:
        stop.set()
        finish(*threads)


def test_exclusive_work_leaves_the_state_as_it_was(gate: Gate, variable: dict[str, str]) -> None:
    with pytest.raises(KeyError), gate.exclusive():
        variable["value"] = "mine"
        raise KeyError
    assert variable["value"] == "usual"
    with gate.step():
        pass  # and the gate is open again


def test_a_state_that_cannot_be_restored_does_not_keep_the_gate_closed(gate: Gate) -> None:
    def restore(_: str) -> None:
        raise KeyError("gone")

    gate.state.register("broken", lambda: "usual", restore)

    def exclusive() -> None:
        with pytest.raises(KeyError), gate.exclusive():
            pass

    finish(run(exclusive))
    finish(run(exclusive))


@pytest.mark.parametrize("how", ["step", "exclusive"])
def test_a_wait_at_the_gate_that_is_broken_off_leaves_nothing_behind(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with gate.exclusive():
            held.set()
            over.wait(WAIT_S)

    def interrupted() -> None:
        raise KeyboardInterrupt

    holder = run(hold)
    held.wait(WAIT_S)
    with monkeypatch.context() as patch:
        patch.setattr(gate._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), getattr(gate, how)():
            pass
    over.set()
    finish(holder)
    for _ in range(2):
        finish(run(lambda: exclusively(gate, lambda: None)))
    assert not gate.exclusive_waiting


def test_steps_never_see_what_yielded_work_changed(gate: Gate, variable: dict[str, str]) -> None:
    seen: list[str] = []

    def step() -> None:
        with gate.step():
            seen.append(variable["value"])

    with gate.exclusive():
        variable["value"] = "mine"
        with gate.yielded():
            finish(run(step))
        assert variable["value"] == "mine"
    assert seen == ["usual"]
    assert variable["value"] == "usual"


def test_nested_exclusive_work_keeps_the_gate(gate: Gate, variable: dict[str, str]) -> None:
    with gate.exclusive():
        variable["value"] = "outer"
        with gate.exclusive():
            variable["value"] = "inner"
        assert gate.held
        assert variable["value"] == "inner"
    assert not gate.held
    assert variable["value"] == "usual"


def test_yielding_outside_of_exclusive_work_does_nothing(gate: Gate) -> None:
    with gate.yielded():
        assert not gate.held


@pytest.fixture(autouse=True)
def thawed() -> None:
    """A runtime that other tests' files share in this process may have left the heap frozen."""
    thaw_heap()


@pytest.fixture
def frozen() -> Iterator[None]:
    freeze_heap()
    yield
    thaw_heap()


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, found: list[Any]) -> None:
        self.me = self
        self.found = found

    def __del__(self) -> None:
        self.found.append(True)


def test_no_collection_while_much_is_made_that_stays() -> None:
    seen: list[str] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    try:
        with uncollected():
            assert [[] for _ in range(100_000)]
        assert not seen
        assert gc.isenabled()
        assert [[] for _ in range(100_000)]
        assert seen
    finally:
        gc.callbacks.remove(note)


class WarmedUp(FakeRuntime):
    """A runtime whose warm-up notes how much is frozen, and may fail."""

    fails = False
    frozen = 0

    async def warm_up(self) -> None:
        self.frozen = gc.get_freeze_count()
        if self.fails:
            raise RuntimeError("cold")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_warm_up_collects_nothing_of_what_is_imported(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    collect, before = gc.collect, gc.get_freeze_count()
    runtime = WarmedUp()
    runtime.fails = fails
    engine = fake_engine(runtime, tmp_path)
    if fails:
        with pytest.raises(RuntimeError, match="cold"):
            await engine.start()
    else:
        await engine.start()
        await engine.stop()
    assert runtime.frozen > before
    assert gc.collect is collect
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("frozen")
def test_nobody_thaws_or_refreezes_the_heap() -> None:
    count = gc.get_freeze_count()
    found: list[Any] = []
    Cycle(found)
    gc.freeze()  # as a library does after a load: would make the cycle immortal
    assert 0 < gc.get_freeze_count() <= count  # what was frozen may end
    gc.unfreeze()
    assert 0 < gc.get_freeze_count() <= count
    gc.collect()
    assert found


@pytest.mark.usefixtures("frozen")
def test_no_collection_while_everybody_waits_at_the_gate() -> None:
    found: list[Any] = []
    gc.disable()
    try:
        Cycle(found)
        with GATE.exclusive():
            gc.collect()
            assert not found
        gc.collect()
        assert found
    finally:
        gc.enable()


def test_thawing_gives_the_collector_back() -> None:
    before = (gc.collect, gc.freeze, gc.unfreeze)
    freeze_heap()
    thaw_heap()
    assert (gc.collect, gc.freeze, gc.unfreeze) == before
    assert gc.get_freeze_count() == 0


def test_quick_switches_last_until_the_last_one_ends() -> None:
    usual_s = sys.getswitchinterval()
    with suppress(ZeroDivisionError), quick_switches():
        with quick_switches():
            assert sys.getswitchinterval() == pytest.approx(QUICK_SWITCH_S)
        assert sys.getswitchinterval() == pytest.approx(QUICK_SWITCH_S)
        raise ZeroDivisionError
    assert sys.getswitchinterval() == usual_s


class Timed:
    """A run that looks how long a thread may hold the interpreter."""

    progress = 0

    def __init__(self, seen: list[float]) -> None:
        self._seen = seen

    def execute(self) -> None:
        self._seen.append(sys.getswitchinterval())

    def cancel(self) -> None:
        pass


async def test_a_run_on_a_thread_lets_steps_have_the_interpreter_quickly() -> None:
    seen: list[float] = []
    with ThreadPoolExecutor(1) as thread:
        async for _ in run_on_thread(thread, lambda _: Timed(seen), torch_error):
            pass
    assert seen == [pytest.approx(QUICK_SWITCH_S)]
    assert sys.getswitchinterval() > QUICK_SWITCH_S
