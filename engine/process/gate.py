"""The gate: what everybody in this process shares, and who may touch it.

Native libraries were written to be alone in a process. They set torch's default
dtype while they build a module, seed the global generators, keep "the current
config" in module globals, and freeze or thaw the whole heap. One process that
runs several of them needs one owner for that state:

* work that only *reads* it, a decode or denoising step, takes `Gate.step()`;
  many at a time;
* work that *changes* it, building a module or capturing a graph, takes
  `Gate.exclusive()`; one at a time, no step beside it, and every registered
  piece of state is put back on the way out;
* the long, harmless part in the middle of such work, moving bytes, is wrapped
  in `Gate.yielded()`: the state is put back and the steps go on meanwhile. No
  other exclusive work begins meanwhile: what a library has patched to build a module
  is no state that can be put back.

A step of many parts, a denoising run, calls `Gate.pause()` between them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.process.shared_state import SharedState

HOLD_S = 0.02
"""How long exclusive work keeps steps waiting before `Gate.breathe` lets them through."""


class Gate:
    """A lock with many steppers or one exclusive holder.

    A waiting exclusive holder goes before new steps, but the steps that waited
    while it held the gate go before the next one: neither starves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = SharedState()
        self._clock = clock
        self._changed = threading.Condition()
        self._stepping: set[int] = set()
        self._waiting: set[int] = set()  # threads that wait for anybody
        self._steps_waiting = 0
        self._turns = 0  # steps that go before the next exclusive holder
        self._holder: int | None = None
        self._held_since_s = 0.0
        self._holds = 0
        self._depth = 0
        self.exclusive_waiting = 0
        """Threads that wait for `exclusive`; to be read without the lock, for a first look."""
        self._owner: int | None = None  # of exclusive work under way, though it may have yielded
        self._outside: dict[str, Any] = {}

    @property
    def held(self) -> bool:
        """Whether the calling thread is doing exclusive work."""
        return self._holder == threading.get_ident()

    @property
    def hold(self) -> int | None:
        """A number that each hold of the gate has for itself; None while nobody holds it."""
        return None if self._holder is None else self._holds

    def waits(self, thread: int) -> bool:
        """Whether a thread, by its `threading.get_ident`, waits for others to leave the gate."""
        return thread in self._waiting

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step of a model: beside other steps, never beside exclusive work."""
        self._enter_step()
        try:
            yield
        finally:
            self._leave_step()

    def pause(self) -> None:
        """Let exclusive work that waits go first, in the middle of a long step."""
        if self.exclusive_waiting:  # read without the lock: a late look costs one part more
            self._leave_step()
            self._enter_step()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change process-wide state: alone, and put back afterwards. A thread may nest it.

        Raises:
            RuntimeError: called in a step, which it would wait for.

        """
        if self.held:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._acquire()
        try:
            self._outside = self.state.save()
            yield
        finally:
            self.state.restore(self._outside)
            self._release(done=True)

    @contextmanager
    def yielded(self) -> Iterator[None]:
        """Let steps go on in the middle of exclusive work, with the state as they expect it.

        Outside of exclusive work this does nothing.
        """
        if not self.held:
            yield
            return
        depth, outside, inside = self._depth, self._outside, self.state.save()
        self.state.restore(outside)
        self._depth = 0
        self._release()
        try:
            yield
        finally:
            self._acquire()
            # What others changed for good meanwhile is what must be put back in the end.
            self._outside = self.state.save()
            self._depth = depth
            self.state.restore(inside)

    def breathe(self) -> None:
        """Let the steps that wait have their turn, if the calling thread has held it for `HOLD_S`.

        Cheap otherwise, and nothing outside of exclusive work: call it anywhere in the
        middle of long work.
        """
        if self.held and self._clock() - self._held_since_s > HOLD_S:
            with self.yielded():
                pass

    def _enter_step(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._steps_waiting += 1
            self._waiting.add(me)
            while self._holder is not None or (self.exclusive_waiting and not self._turns):
                self._changed.wait()
            self._waiting.discard(me)
            self._steps_waiting -= 1
            self._turns = max(0, self._turns - 1)
            self._stepping.add(me)

    def _leave_step(self) -> None:
        with self._changed:
            self._stepping.discard(threading.get_ident())
            if not self._stepping:
                self._changed.notify_all()

    def _acquire(self) -> None:
        me = threading.get_ident()
        if me in self._stepping:
            raise RuntimeError("exclusive work was asked for in the middle of a step")
        with self._changed:
            # Behind other exclusive work under way this does not hold up steps: that would be
            # for as long as it takes, not for one part of it.
            self._waiting.add(me)
            while self._owner not in (None, me):
                self._changed.wait()
            self._owner = me
            self.exclusive_waiting += 1
            while self._holder is not None or self._stepping or self._turns:
                self._changed.wait()
            self.exclusive_waiting -= 1
            self._waiting.discard(me)
            self._holds += 1
            self._holder = me
            self._held_since_s = self._clock()

    def _release(self, *, done: bool = False) -> None:
        with self._changed:
            self._holder = None
            if done:
                self._owner = None
            self._turns = self._steps_waiting
            self._changed.notify_all()


GATE = Gate()
"""There is one process, so there is one gate."""
