"""The heap of the process: frozen once the libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from engine.process.gate import GATE

_gc_collect, _gc_freeze, _gc_unfreeze = gc.collect, gc.freeze, gc.unfreeze


@contextmanager
def uncollected() -> Iterator[None]:
    """Run no garbage collections during imports: what these make stays.

    Collections would scan ever more objects and find nothing: a sixth of a start's processor time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _leave_heap() -> None:
    """Replaces `gc.freeze` and `gc.unfreeze` while this module owns the heap."""


def _collect_outside_gate(generation: int = 2) -> int:
    """Replaces `gc.collect`. Inside the gate, while others wait, it skips: an unload collects."""
    return 0 if GATE.held else _gc_collect(generation)


def freeze_heap() -> None:
    """Exclude all imported objects from garbage collection, for good.

    With the runtimes imported the heap holds some 685,000 objects. One full collection stops every
    thread for 0.3 s, and a vLLM load makes several. vLLM also freezes and thaws the heap around
    every engine. Its freeze would make a dead engine's cycles immortal, and its thaw would bring
    the stall back. So both are turned off, and collections inside the gate are skipped.

    Call it after the imports and before any load, and again after more objects that stay.
    """
    _gc_collect()
    _gc_freeze()
    gc.freeze = gc.unfreeze = _leave_heap
    gc.collect = _collect_outside_gate


def thaw_heap() -> None:
    """Undo `freeze_heap`: an engine that stops leaves the process as it found it."""
    gc.collect, gc.freeze, gc.unfreeze = _gc_collect, _gc_freeze, _gc_unfreeze
    gc.unfreeze()
