"""A torch model and one request on it.

A hook watches the run between modules, and the working memory of each shape is measured once.

Importing this module imports torch.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from engine.events import Event, WorkingMemory
from engine.memory.host_memory import HostMemory
from engine.memory.peak import TensorPeak
from engine.memory.slabs import SharedMemory
from engine.memory.weights import Weights
from engine.process.gate import GATE

WHOLE = "weights"
"""The one block of a model whose parts share tensors."""


class Cancelled(BaseException):
    """The run was cancelled. Not an `Exception`, so that library code does not catch it."""


class TorchParts:
    """The parts of one model. Build them in host memory, then `place` them.

    A run uses the model's thread. Every other method needs that nothing runs.
    """

    weights: Weights
    """Set by `place`."""

    def __init__(self, parts: Mapping[str, torch.nn.Module], device: str) -> None:
        """`parts` hold every weight. Each part is one block."""
        self.device = device
        self.running: TorchRun | None = None
        self.measured: set[str] = set()
        """Shapes whose working memory was measured since the load."""
        self._parts = parts
        for part in parts.values():
            for each in part.modules():
                # Only modules made of others. A hook costs two microseconds a call: before each
                # single layer of a small model (Bark) that was a twentieth of its time.
                if each._modules:
                    each.register_forward_pre_hook(self._before_module)

    def _before_module(self, _module: Any, _args: Any) -> None:
        # Called thousands of times a second, so it calls nothing without cause.
        run = self.running
        if run is not None:
            run.progress += 1
            if run.cancelled or GATE.exclusive_waiting:
                run.check()

    def place(self, host: HostMemory | None) -> None:
        """Bring the parts onto the device, and their master copies into `host` if it has room.

        Call it outside of the gate: reading and copying may take long.

        Raises:
            torch.OutOfMemoryError: the device lacks the room.
            OSError: a file cannot be read.

        """
        parts = {name: [part] for name, part in self._parts.items()}
        try:
            self.weights = Weights.adopt(parts, host, self.device)
        except SharedMemory:  # so they come and go together
            together = {WHOLE: list(self._parts.values())}
            self.weights = Weights.adopt(together, host, self.device)

    def park(self, blocks: Collection[str]) -> None:
        """Take parts off the device."""
        self.weights.park(blocks)

    def wake(self, blocks: Collection[str]) -> None:
        """Bring parked parts back, all of them or none.

        Raises:
            torch.OutOfMemoryError: the device lacks the room.

        """
        self.weights.wake(blocks)

    def close(self) -> None:
        """Give the master copies back. The model must not be used any more."""
        self.weights.close()

    def known_tensors(self) -> Iterator[torch.Tensor]:
        """Every weight."""
        for part in self._parts.values():
            for _, tensor in named_tensors(part):
                yield tensor


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer of a module, by its name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The parts of a model that is one module: its children, and `other`, its own tensors."""
    other = torch.nn.Module()
    other._parameters, other._buffers = module._parameters, module._buffers
    return {**dict(module.named_children()), "other": other}


class TorchRun(ABC):
    """One request on one model. `execute` runs on the model's thread; any thread may `cancel`."""

    def __init__(self, model: TorchParts, shape: str, emit: Callable[[Event], None]) -> None:
        """Working memory is measured once for each `shape`, and never for the empty shape."""
        self._model = model
        self._shape = shape
        self._emit = emit
        self.cancelled = False
        self.progress = 0
        """Number of modules entered so far, of those made of others."""

    def cancel(self) -> None:
        """Stop at the next module, if the run has not ended."""
        self.cancelled = True

    def execute(self) -> None:
        """Do the work and emit its results. Return early if cancelled.

        Raises:
            InvalidRequest: the model cannot serve the request.
            Exception: any error of the library.

        """
        if self.cancelled:
            return
        try:
            self._model.running = self
            self._run()
        except Cancelled:
            return
        except Exception as error:
            # The frames hold tensors, as long as anything holds the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self._model.running = None

    @abstractmethod
    def _run(self) -> None:
        """Do the work inside `GATE.step()`, and its large allocations inside `_measured()`."""

    def check(self) -> None:
        """Stop if cancelled, and let exclusive work go first. Only inside `GATE.step()`."""
        if self.cancelled:
            raise Cancelled
        GATE.pause()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure the working memory of a shape once. On a CPU that costs a tenth of the time."""
        model, shape = self._model, self._shape
        if not shape or shape in model.measured:
            yield
            return
        if model.device == "cpu":
            with TensorPeak(model.known_tensors()) as peak:
                yield
            nbytes = peak.nbytes
        else:
            holds = GATE.holds
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            if GATE.holds != holds:
                return  # torch counts for the whole process: a load beside it would be in
            nbytes = torch.cuda.max_memory_allocated() - before
        model.measured.add(shape)
        self._emit(WorkingMemory(nbytes))
