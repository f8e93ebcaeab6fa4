"""One request on one speech model, sentence by sentence, stopped within a module.

Importing this module imports torch.
"""

from __future__ import annotations

import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.peak import TensorPeak
from engine.process import GATE
from engine.randomness import seeded
from engine.requests import Event, Speech, SpeechRequest, WorkingMemory
from engine.runtimes.speech import Utterance


class Cancelled(BaseException):
    """The run was told to stop. Not an `Exception`: library code must not take it for its own."""


class Speaker(ABC):
    """A loaded speech model. Its methods but the constructor run on the model's thread."""

    def __init__(self, module: Any, device: str) -> None:
        """`module` is the filled `torch.nn.Module`, on the device."""
        self.module = module
        self.device = device
        self.watch: Callable[[], None] | None = None
        """Called before every module of a run."""
        self.measured: set[str] = set()
        """Shapes whose working memory was measured since the load."""
        for each in module.modules():
            each.register_forward_pre_hook(self._before_module)

    @abstractmethod
    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:
        """The pieces of audio in order, at least one a sentence.

        Called inside `seeded` and `GATE.step()`.

        Raises:
            InvalidRequest: the model cannot speak this.
            Exception: what the library raised.

        """

    def _before_module(self, _module: Any, _args: Any) -> None:
        if self.watch is not None:
            self.watch()

    def part_bytes(self) -> dict[str, int]:
        """Device bytes of each part: the module's children, and what it holds itself."""
        parts = dict(self.module.named_children())
        seen: set[int] = set()
        sizes = {}
        for name, part in [*parts.items(), ("other", self.module)]:
            nbytes = 0
            for tensor in _tensors(part):
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    nbytes += storage.nbytes()
            if nbytes:
                sizes[name] = nbytes
        return sizes

    def known_tensors(self) -> Iterator[torch.Tensor]:
        """Every weight."""
        return _tensors(self.module)


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class Run:
    """One request on one model. `execute` on the model's thread, `cancel` from any."""

    def __init__(
        self,
        speaker: Speaker,
        request: SpeechRequest,
        utterance: Utterance,
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        self._speaker = speaker
        self._request = request
        self._utterance = utterance
        self._shape = shape
        self._emit = emit
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop at the next module; nothing if it has ended."""
        self._cancelled.set()

    def execute(self) -> None:
        """Emit the audio as it is made. Returns early if it was cancelled.

        Raises:
            InvalidRequest: the model cannot speak what is asked.
            Exception: what the library raised.

        """
        speaker, utterance = self._speaker, self._utterance
        try:
            self._check()
            speaker.watch = self._check
            with GATE.step(), seeded(utterance.seed), self._peak():
                for speech in speaker.speak(self._request, utterance):
                    self._emit(speech)
                    self._check()
        except Cancelled:
            return
        except Exception as error:
            # The frames hold tensors for as long as somebody holds the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            speaker.watch = None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        GATE.pause()

    @contextmanager
    def _peak(self) -> Iterator[None]:
        """Measure the working memory of a shape once: it costs a tenth of the time on a CPU."""
        speaker, shape = self._speaker, self._shape
        if not shape or shape in speaker.measured:
            yield
            return
        if speaker.device == "cpu":
            with TensorPeak(speaker.known_tensors()) as peak:
                yield
            nbytes = peak.nbytes
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            nbytes = torch.cuda.max_memory_allocated() - before
        speaker.measured.add(shape)
        self._emit(WorkingMemory(nbytes))
