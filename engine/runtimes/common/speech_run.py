"""One request on one speech model, sentence by sentence. It stops within a module.

Importing this module imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from engine.events import Event, Speech
from engine.process.gate import GATE
from engine.process.randomness import seeded
from engine.requests import SpeechRequest
from engine.runtimes.common.torch_run import TorchParts, TorchRun, children_of
from engine.runtimes.common.utterance import Utterance


class Speaker(TorchParts, ABC):
    """A speech model. It speaks on the model's thread."""

    def __init__(self, module: Any, device: str) -> None:
        """`module` is the filled `torch.nn.Module`, in host memory."""
        super().__init__(children_of(module), device)
        self.module = module

    @abstractmethod
    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:
        """The pieces of audio in order, at least one a sentence.

        Called inside `seeded` and `GATE.step()`.

        Raises:
            InvalidRequest: the model cannot speak this.
            Exception: what the library raised.

        """

    def check(self, utterance: Utterance) -> None:
        """Refuse a text of which the model would leave words out, before anything is spoken.

        Raises:
            InvalidRequest: naming `input`.

        """

    def forget_run(self) -> None:
        """Drop what the library keeps of the last run on the device."""


class SpeechRun(TorchRun):
    """One request on one model."""

    def __init__(
        self,
        speaker: Speaker,
        request: SpeechRequest,
        utterance: Utterance,
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(speaker, shape, emit)
        self._speaker = speaker
        self._request = request
        self._utterance = utterance

    def _run(self) -> None:
        try:
            self._speaker.check(self._utterance)
            with GATE.step(), seeded(self._utterance.seed), self._measured():
                for speech in self._speaker.speak(self._request, self._utterance):
                    self._emit(speech)
                    self.check()
        finally:
            self._speaker.forget_run()
