"""The gate: it owns the state that the whole process shares.

Native libraries were written to be alone in a process. They set torch's default dtype while they
build a module, seed the global generators, keep "the current config" in module globals, and
freeze or thaw the whole heap. A process with several of them needs one owner of that state:

* Work that only *reads* it (a decode step, a denoising step) takes `Gate.step()`. Many steps run
  at a time.
* Work that *changes* it (building a module, capturing a graph) takes `Gate.exclusive()`. It runs
  alone, without any step beside it. At its end every registered variable is restored.
* The long, harmless part in the middle of such work (moving bytes) is wrapped in
  `Gate.yielded()`. The state is restored and steps go on during that part. Other exclusive work
  still waits: what a library has patched to build a module cannot be restored.

A step of many parts (a denoising run) calls `Gate.pause()` between them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.process.shared_state import SharedState

HOLD_S = 0.02
"""How long exclusive work makes steps wait before `Gate.breathe` lets them through."""


class Gate:
    """A lock for many steps or one exclusive holder.

    Waiting exclusive work goes before new steps. The steps that waited while it held the gate go
    before the next exclusive work. So neither starves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = SharedState()
        self._clock = clock
        self._changed = threading.Condition()
        self._stepping: set[int] = set()
        self._waiting: set[int] = set()  # threads that wait at the gate
        self._steps_waiting = 0
        self._turns = 0  # steps that go before the next exclusive holder
        self._holder: int | None = None
        self._held_since_s = 0.0
        self._holds = 0
        self._depth = 0
        self.exclusive_waiting = 0
        """Threads that wait for `exclusive`. `pause` reads it without the lock, as a quick test."""
        self._owner: int | None = None  # of exclusive work under way, even while it has yielded
        self._outside: dict[str, Any] = {}

    @property
    def held(self) -> bool:
        """Whether the calling thread is doing exclusive work."""
        return self._holder == threading.get_ident()

    @property
    def hold(self) -> int | None:
        """The number of the current exclusive hold, new for each; None while there is none."""
        return None if self._holder is None else self._holds

    @property
    def holds(self) -> int:
        """How many exclusive holds there have been."""
        return self._holds

    def waits(self, thread: int) -> bool:
        """Whether a thread, by its `threading.get_ident`, waits at the gate."""
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
        """In the middle of a long step, let waiting exclusive work go first."""
        if self.exclusive_waiting:  # without the lock: a stale value costs one more part
            self._leave_step()
            self._enter_step()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change process-wide state alone; it is restored at the end. A thread may nest it.

        Raises:
            RuntimeError: called in a step; it would wait for that step for ever.

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
            try:
                yield
            finally:
                self.state.restore(self._outside)
        finally:  # whatever becomes of the state: a gate that stays closed stops every model
            self._release(done=True)

    @contextmanager
    def yielded(self) -> Iterator[None]:
        """Let steps go on in the middle of exclusive work, with the state that they expect.

        Outside exclusive work this does nothing.
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
            self._depth = depth
            # What others changed for good during the yield is what the end must restore.
            self._outside = self.state.save()
            self.state.restore(inside)

    def breathe(self) -> None:
        """Let waiting steps take their turn if the calling thread has held the gate for `HOLD_S`.

        Otherwise it is cheap, and outside exclusive work it does nothing. So call it anywhere in
        the middle of long work.
        """
        if self.held and self._clock() - self._held_since_s > HOLD_S:
            with self.yielded():
                pass

    def _enter_step(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._steps_waiting += 1
            self._waiting.add(me)
            try:
                while self._holder is not None or (self.exclusive_waiting and not self._turns):
                    self._changed.wait()
            finally:
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
            # While this waits for other exclusive work it must not hold up steps: they would wait
            # for the whole of that work, not for one part of it.
            self._waiting.add(me)
            owned = self._owner == me
            try:
                while self._owner not in (None, me):
                    self._changed.wait()
                self._owner = me
                self.exclusive_waiting += 1
                try:
                    while self._holder is not None or self._stepping or self._turns:
                        self._changed.wait()
                finally:
                    self.exclusive_waiting -= 1
            except BaseException:
                if self._owner == me and not owned:
                    self._owner = None
                self._changed.notify_all()
                raise
            finally:
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
