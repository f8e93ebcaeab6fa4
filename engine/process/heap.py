"""The heap of the process: frozen once the libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from engine.process.gate import GATE

_gc_collect, _gc_freeze, _gc_unfreeze = gc.collect, gc.freeze, gc.unfreeze


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


def _leave_heap() -> None:
    """Stand in for `gc.freeze` and `gc.unfreeze` once the heap is ours."""


def _collect_outside_gate(generation: int = 2) -> int:
    """Stand in for `gc.collect`: not while everybody waits at the gate; an unload collects."""
    return 0 if GATE.held else _gc_collect(generation)


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
