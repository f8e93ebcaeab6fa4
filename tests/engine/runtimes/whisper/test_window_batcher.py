"""Which calls go together, with calls made up here and no library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from engine.runtimes.common.transcription import Cancelled
from engine.runtimes.whisper.window_batcher import Call, Pace, Step, WindowBatcher

LIMIT_S = 10.0


class Model:
    """Notes what it was called with. The first call of all is held."""

    def __init__(self, batcher: WindowBatcher) -> None:
        self.batcher = batcher
        self.calls: list[tuple[Any, ...]] = []
        self.fails: Callable[[Sequence[Any]], Exception | None] = lambda _: None
        self.held, self.go_on = threading.Event(), threading.Event()

    def compute(self, items: Sequence[Any]) -> Sequence[Any]:
        self.calls.append(tuple(items))
        self.held.set()
        assert self.go_on.wait(LIMIT_S)
        error = self.fails(items)
        if error is not None:
            raise error
        return [item.upper() for item in items]

    def make(
        self, items: str, key: str = "same", cancelled: str = "", step: Step = Step.DECODE
    ) -> dict[str, Future[Any]]:
        """Hold a call `first`, let one of each item come meanwhile, then go on."""

        def call(item: str, key: str | None) -> Future[Any]:
            asked = Call(step, key, item, self.compute, lambda: item in cancelled)
            return pool.submit(self.batcher.make, asked)

        with ThreadPoolExecutor(len(items) + 1) as pool:
            found = {"first": call("first", None)}
            assert self.held.wait(LIMIT_S)
            for count, item in enumerate(items, 1):
                found[item] = call(item, key if item.islower() else item)
                assert self.batcher.wait_for(count, LIMIT_S)
            self.go_on.set()
        return found


def model_of(limit: int = 4) -> Model:
    """Alone takes 1 s, together 0.5 s: batches pay."""
    batcher = WindowBatcher(limit)
    for step in Step:
        batcher.paces[step] = Pace(alone_s=1.0, together_s=0.5)
    return Model(batcher)


def test_what_came_during_a_call_goes_together_up_to_the_limit() -> None:
    model = model_of()
    found = model.make("abcde")
    assert model.calls == [("first",), ("a", "b", "c", "d"), ("e",)]
    assert [found[item].result() for item in "abcde"] == ["A", "B", "C", "D", "E"]


def test_calls_of_other_options_go_apart() -> None:
    model = model_of()
    model.make("aXbY")
    assert sorted(model.calls[1:]) == [("X",), ("Y",), ("a", "b")]


def test_a_cancelled_call_leaves_the_others() -> None:
    model = model_of()
    found = model.make("abc", cancelled="b")
    assert model.calls[1:] == [("a", "c")]
    assert isinstance(found["b"].exception(), Cancelled)
    assert (found["a"].result(), found["c"].result()) == ("A", "C")


def test_a_batch_without_room_is_made_one_by_one_and_later_ones_are_smaller() -> None:
    model = model_of()
    model.fails = lambda items: RuntimeError("CUDA out of memory") if len(items) > 1 else None
    found = model.make("abcd")
    assert model.calls[1:] == [("a", "b", "c", "d"), ("a",), ("b",), ("c",), ("d",)]
    assert [found[item].result() for item in "abcd"] == ["A", "B", "C", "D"]
    assert model.batcher.limit == 2


def test_a_window_fails_by_its_own_fault_alone() -> None:
    model = model_of()
    model.fails = lambda items: ValueError("b is bad") if "b" in items else None
    found = model.make("abc")
    assert isinstance(found["b"].exception(), ValueError)
    assert (found["a"].result(), found["c"].result()) == ("A", "C")
    assert model.batcher.limit == 4


@pytest.mark.parametrize(("batch_s", "pays"), [(0.5, True), (0.99, False), (1.5, False)])
def test_batches_are_declined_where_they_lose(batch_s: float, pays: bool) -> None:
    pace = Pace()
    assert not pace.choose()  # a window alone is measured first
    pace.note(1, 10, 10.0)
    assert pace.choose()
    pace.note(4, 40, 40 * batch_s)
    chosen = [pace.choose() for _ in range(48)]
    assert chosen.count(pays) == 46  # twice the other way is measured anew
    pace.note(4, 1, 100.0)
    assert not pace.choose()  # a batch that got slow
