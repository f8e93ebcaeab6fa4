"""Shared by the runtimes that hear recordings: checks, a model with threads, one request on it.

Nothing here imports a library. Those libraries compute on threads of their own, and have one
exception for most failures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from math import isfinite

from engine.config import ModelConfig
from engine.errors import (
    EngineError,
    InvalidRequest,
    OutOfDeviceMemory,
    RuntimeFailed,
    reason,
)
from engine.events import Event
from engine.requests import Request, TranscriptionRequest
from engine.runtimes.base import LoadedModel, Prepared
from engine.runtimes.common.thread_run import Emit, ThreadRun, run_on_thread

USUAL_BYTES_PER_S = 8000
"""Of a compressed recording (64 kbit/s). It gives the length before the recording is decoded."""

SHORTAGES = ("out of memory", "failed to allocate", "bad_alloc")
"""What CTranslate2, onnxruntime and sherpa-onnx say of a lack of memory."""


class Cancelled(Exception):
    """The caller cancelled the run."""


def check_transcription(model: ModelConfig, request: Request) -> TranscriptionRequest:
    """Refuse requests that no transcription model can serve.

    Raises:
        InvalidRequest: naming `model`, `file` or `temperature`.

    """
    if model.task != "transcribe" or not isinstance(request, TranscriptionRequest):
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )
    if not request.audio:
        raise InvalidRequest("The file is empty.", param="file")
    if not (isfinite(request.temperature) and 0 <= request.temperature <= 1):
        raise InvalidRequest("temperature must be from 0 to 1.", param="temperature")
    return request


class TranscriptionModel(LoadedModel):
    """One model, whose runs each take one of its threads."""

    threads: ThreadPoolExecutor

    @abstractmethod
    def make_run(self, request: TranscriptionRequest, emit: Emit) -> ThreadRun:
        """A run of the request on this model, not begun."""

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Transcribe. Closing the generator stops it at the next packet or window."""
        assert isinstance(prepared.request, TranscriptionRequest)
        make_run = partial(self.make_run, prepared.request)
        running = run_on_thread(self.threads, make_run, library_error, helpers=True)
        async with aclosing(running) as events:
            async for event in events:
                yield event


class RecordingRun(ABC):
    """One recording on one model."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._cancelled = False
        self.progress = 0
        """How often the run has looked whether to go on: at packets, windows and computations."""

    def cancel(self) -> None:
        """Make `execute` return soon."""
        self._cancelled = True

    @abstractmethod
    def execute(self) -> None:
        """Decode, and emit what is found.

        Raises:
            InvalidRequest: the file is not audio, or the model cannot serve the request.

        """

    def _check(self) -> None:
        self.progress += 1
        if self._cancelled:
            raise Cancelled


class TranscriptionRun(RecordingRun):
    """One request for a transcript."""

    def __init__(self, request: TranscriptionRequest, emit: Emit) -> None:
        super().__init__(emit)
        self._request = request


def library_error(error: Exception) -> EngineError:
    """The error of a run as an error of the engine."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(each in text for each in SHORTAGES):
        return OutOfDeviceMemory(f"The device ran out of memory: {reason(error)}")
    return RuntimeFailed(f"The model failed while running: {reason(error)}")
