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

The heap is frozen once the libraries are imported (`freeze_heap`).
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

QUICK_SWITCH_S = 0.0001
"""How long a thread may hold the interpreter while another waits, in `quick_switches`.

A step lets go of the interpreter at every torch operation and waits to have it back while a
load beside it runs Python. Measured on two cores, a step of 9 ms: 90 ms beside a load at an
interval of 0.5 ms, 50 ms at 0.1 ms, no better at 0.02 ms, where the load itself gets slower.
CPython's own 5 ms are better where only the event loop runs beside the steps, in short pieces:
12-15 % more tokens a second with 16 and 64 streams.
"""

QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables that the libraries read as they are imported."""
QUIET_LOGGERS = ("torch._library.triton",)

HOLD_S = 0.02
"""How long exclusive work keeps steps waiting before `Gate.breathe` lets them through."""


class SharedState:
    """The process-wide variables that exclusive work may change."""

    def __init__(self) -> None:
        self._variables: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "random": (random.getstate, random.setstate),
        }

    def register(self, name: str, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        """Add a variable to what is saved and put back."""
        self._variables[name] = (get, put)

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def save(self) -> dict[str, Any]:
        """The present value of every variable."""
        return {name: get() for name, (get, _) in self._variables.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Put back what `save` returned; variables registered since are left alone."""
        for name, value in saved.items():
            self._variables[name][1](value)


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

_gc_collect, _gc_freeze, _gc_unfreeze = gc.collect, gc.freeze, gc.unfreeze


_switch_lock = threading.Lock()
_quick = 0
_usual_switch_s = 0.0


@contextmanager
def quick_switches() -> Iterator[None]:
    """Python runs on another thread for long: let steps have the interpreter back quickly."""
    global _quick, _usual_switch_s
    with _switch_lock:
        if not _quick:
            _usual_switch_s = sys.getswitchinterval()
            sys.setswitchinterval(QUICK_SWITCH_S)
        _quick += 1
    try:
        yield
    finally:
        with _switch_lock:
            _quick -= 1
            if not _quick:
                sys.setswitchinterval(_usual_switch_s)


def _leave_heap() -> None:
    """Stand in for `gc.freeze` and `gc.unfreeze` once the heap is ours."""


def _collect_outside_gate(generation: int = 2) -> int:
    """Stand in for `gc.collect`: not while everybody waits at the gate; an unload collects."""
    return 0 if GATE.held else _gc_collect(generation)


def share_torch_state(gate: Gate = GATE) -> None:
    """Register what torch and NumPy keep for the whole process. Call once torch is imported.

    From then on the gate breathes at every submodule that a module under construction gets.
    """
    if "torch.rng" in gate.state:
        return
    import numpy
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook

    def breathe(*_module_name_submodule: Any) -> None:
        gate.breathe()

    register_module_module_registration_hook(breathe)

    gate.state.register("torch.default_dtype", torch.get_default_dtype, torch.set_default_dtype)
    gate.state.register("torch.rng", torch.get_rng_state, torch.set_rng_state)
    # vLLM's CPU worker replaces the function itself by one that only warns.
    set_num_threads = torch.set_num_threads

    def put_num_threads(number: int) -> None:
        # It is the calling thread's, but setting it also tells what later threads begin with.
        if torch.get_num_threads() != number:
            set_num_threads(number)

    gate.state.register("torch.num_threads", torch.get_num_threads, put_num_threads)
    gate.state.register(
        "torch.set_num_threads",
        lambda: set_num_threads,
        lambda function: setattr(torch, "set_num_threads", function),
    )
    gate.state.register("numpy.random", numpy.random.get_state, numpy.random.set_state)
    if torch.cuda.is_available():
        gate.state.register(
            "torch.cuda.rng", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
        )


def quiet_libraries() -> None:
    """Have shared libraries tell errors only. Call before any of them is imported.

    What they warn of here is a choice of ours, or nothing that an operator could mend: that there
    is no Triton, no torchvision, and how the memory of a CPU is bound. Variables that the operator
    set are left as they are.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def uncollected() -> Iterator[None]:
    """Make no garbage collections while much is made that stays: imports.

    They look through ever more objects to find nothing: a sixth of a start's processor time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def freeze_heap() -> None:
    """Take what is imported out of the garbage collector's sight, for good.

    With the runtimes imported the heap holds some 685,000 objects and one full
    collection stops every thread for 0.3 s; a vLLM load makes several. vLLM
    freezes and thaws the heap itself around every engine: its freeze would
    make a dead engine's cycles immortal, its thaw would bring the stall back,
    so both are turned off, and collections inside the gate are left out.
    Call after the imports, before any load, and again when more has been made that stays.
    """
    _gc_collect()
    _gc_freeze()
    gc.freeze = gc.unfreeze = _leave_heap
    gc.collect = _collect_outside_gate


def thaw_heap() -> None:
    """Undo `freeze_heap`; an engine that stops leaves the process as it found it."""
    gc.collect, gc.freeze, gc.unfreeze = _gc_collect, _gc_freeze, _gc_unfreeze
    gc.unfreeze()
