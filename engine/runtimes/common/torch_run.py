"""A model of torch and one request on it: watched between modules, its working memory measured.

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
"""The one block of a model whose parts use each other's tensors."""


class Cancelled(BaseException):
    """The run was told to stop. Not an `Exception`: library code must not take it for its own."""


class TorchParts:
    """The parts of one model. A run of it goes on the model's thread, all else where nothing runs.

    Build it in host memory, then `place` it.
    """

    weights: Weights
    """From `place` on."""

    def __init__(self, parts: Mapping[str, torch.nn.Module], device: str) -> None:
        """`parts` hold every weight; each is one block."""
        self.device = device
        self.running: TorchRun | None = None
        self.measured: set[str] = set()
        """Shapes whose working memory was measured since the load."""
        self._parts = parts
        for part in parts.values():
            for each in part.modules():
                # Only those made of others: a hook costs two microseconds a call, and before each
                # single layer of a small model that was a twentieth of its time (Bark).
                if each._modules:
                    each.register_forward_pre_hook(self._before_module)

    def _before_module(self, _module: Any, _args: Any) -> None:
        # Thousands of times a second: no call unless there is cause.
        run = self.running
        if run is not None:
            run.progress += 1
            if run.cancelled or GATE.exclusive_waiting:
                run.check()

    def place(self, host: HostMemory | None) -> None:
        """Bring the parts onto the device, their master copies into `host` if it has the room.

        Call outside of the gate: it reads and copies, which may take long.

        Raises:
            torch.OutOfMemoryError: the device lacks the room.
            OSError: a file cannot be read.

        """
        parts = {name: [part] for name, part in self._parts.items()}
        try:
            self.weights = Weights.adopt(parts, host, self.device)
        except SharedMemory:  # then they come and go together
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
        """Give the master copies back; the model must not be used any more."""
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
    """The parts of a model that is one module: its children, and `other`, what it holds itself."""
    other = torch.nn.Module()
    other._parameters, other._buffers = module._parameters, module._buffers
    return {**dict(module.named_children()), "other": other}


class TorchRun(ABC):
    """One request on one model. `execute` on the model's thread, `cancel` from any."""

    def __init__(self, model: TorchParts, shape: str, emit: Callable[[Event], None]) -> None:
        """Working memory is measured once for each `shape`; for the empty one never."""
        self._model = model
        self._shape = shape
        self._emit = emit
        self.cancelled = False
        self.progress = 0
        """Modules made of others entered so far."""

    def cancel(self) -> None:
        """Stop at the next module; nothing if it has ended."""
        self.cancelled = True

    def execute(self) -> None:
        """Emit what is made. Returns early if it was cancelled.

        Raises:
            InvalidRequest: the model cannot do what is asked.
            Exception: what the library raised.

        """
        if self.cancelled:
            return
        try:
            self._model.running = self
            self._run()
        except Cancelled:
            return
        except Exception as error:
            # The frames hold tensors for as long as somebody holds the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self._model.running = None

    @abstractmethod
    def _run(self) -> None:
        """Do the work inside `GATE.step()`, and what takes memory inside `_measured()`."""

    def check(self) -> None:
        """Look for a cancel, and let exclusive work go first. Only inside `GATE.step()`."""
        if self.cancelled:
            raise Cancelled
        GATE.pause()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure the working memory of a shape once: it costs a tenth of the time on a CPU."""
        model, shape = self._model, self._shape
        if not shape or shape in model.measured:
            yield
            return
        if model.device == "cpu":
            with TensorPeak(model.known_tensors()) as peak:
                yield
            nbytes = peak.nbytes
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            nbytes = torch.cuda.max_memory_allocated() - before
        model.measured.add(shape)
        self._emit(WorkingMemory(nbytes))
