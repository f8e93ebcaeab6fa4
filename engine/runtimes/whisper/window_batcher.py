"""The calls of one model that several runs make at once, put together where that pays.

Runs are on threads of their own. Whoever finds the model free makes the next call, for all calls
that wait and fit together. Nobody waits for company: a batch is what came during the call before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from engine.runtimes.common.transcription import Cancelled

WEIGHT: Final = 0.3
"""Of the newest measurement in the moving average."""

MARGIN: Final = 0.97
"""A batch pays if an item of it takes at most this much of the time that it takes alone."""

PROBE: Final = 24
"""Once in so many choices the worse way is taken, to measure it anew."""


class Step(IntEnum):
    """What the model does. Encoders go first, so that more windows are there for a decoder."""

    ENCODE = 0
    DECODE = 1


@dataclass(eq=False, slots=True)
class Call:
    """One window that waits for the model."""

    step: Step
    key: Hashable
    """Calls of equal keys may be made together; None: this one is made alone."""
    item: Any
    compute: Callable[[Sequence[Any]], Sequence[Any]]
    """The results of items of equal keys, in their order."""
    cancelled: Callable[[], bool]
    size: Callable[[Any], int] = lambda _: 1
    """How much work a result was."""
    done: bool = False
    result: Any = None
    error: Exception | None = None


@dataclass(slots=True)
class Pace:
    """Seconds of a unit of work, alone and in batches, and which of them is shorter."""

    alone_s: float | None = None
    together_s: float | None = None
    choices: int = 0

    def choose(self) -> bool:
        """Whether to make the next calls together. Each way is measured before it is judged."""
        if self.alone_s is None or self.together_s is None:
            return self.alone_s is not None
        self.choices += 1
        pays = self.together_s <= MARGIN * self.alone_s
        return pays != (self.choices % PROBE == 0)

    def note(self, count: int, units: int, seconds: float) -> None:
        """Count a call of so many windows."""
        found = seconds / max(1, units)
        if count == 1:
            self.alone_s = _moved(self.alone_s, found)
        else:
            self.together_s = _moved(self.together_s, found)


def _moved(average: float | None, found: float) -> float:
    return found if average is None else (1 - WEIGHT) * average + WEIGHT * found


@dataclass(eq=False)
class WindowBatcher:
    """Makes the calls of one model, one after another."""

    limit: int
    """The most windows in one call."""
    clock: Callable[[], float] = time.perf_counter
    paces: dict[Step, Pace] = field(default_factory=lambda: {step: Pace() for step in Step})
    _waiting: list[Call] = field(default_factory=list)
    _busy: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def make(self, call: Call) -> Any:
        """Wait for the result of a call, and make calls of others in the meantime.

        Raises:
            Cancelled: the run was cancelled before its turn.
            Exception: what the library raised for this call alone.

        """
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
        while (batch := self._next(call)) is not None:
            try:
                self._compute(batch)
            finally:
                with self._changed:
                    for each in batch:
                        each.done = True
                    self._busy = False
                    self._changed.notify_all()
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # its traceback holds this call
        return call.result

    def wait_for(self, count: int, timeout_s: float) -> bool:
        """Wait until at least so many calls wait for their turn."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) >= count, timeout_s)

    def _next(self, call: Call) -> list[Call] | None:
        """What the thread of `call` is to compute next; None: its result is there."""
        with self._changed:
            self._changed.wait_for(lambda: call.done or not self._busy)
            if not call.done:
                self._drop_cancelled()
            if call.done:
                return None
            first = min(self._waiting, key=lambda each: each.step)  # the oldest of its step
            batch = [each for each in self._waiting if each.key == first.key]
            if first.key is None or len(batch) == 1 or not self._choose(first.step):
                batch = [first]
            batch = batch[: self.limit]
            self._waiting = [each for each in self._waiting if each not in batch]
            self._busy = True
            return batch

    def _choose(self, step: Step) -> bool:
        return self.limit > 1 and self.paces[step].choose()

    def _drop_cancelled(self) -> None:
        for each in [each for each in self._waiting if each.cancelled()]:
            self._waiting.remove(each)
            each.error = Cancelled()
            each.done = True
        self._changed.notify_all()

    def _compute(self, batch: Sequence[Call]) -> None:
        if len(batch) > 1:
            try:
                self._together(batch)
            except Exception as error:
                if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                    self.limit = max(1, len(batch) // 2)
            else:
                return
        # After a failure one by one: a window fails by its own fault alone.
        for each in batch:
            try:
                self._together([each])
            except Exception as error:
                each.error = error

    def _together(self, batch: Sequence[Call]) -> None:
        first = batch[0]
        began_s = self.clock()
        results = first.compute([each.item for each in batch])
        seconds = self.clock() - began_s
        for each, result in zip(batch, results, strict=True):
            each.result = result
        if first.key is not None:
            units = sum(each.size(each.result) for each in batch)
            self.paces[first.step].note(len(batch), units, seconds)
