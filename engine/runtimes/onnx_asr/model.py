"""A model of onnx-asr whose computations stop when they are told to. Imports the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from engine.errors import LoadFailed
from engine.events import Samples
from engine.runtimes.onnx_asr.options import ModelType
from onnx_asr.asr import TimestampedResult
from onnx_asr.loader import create_asr_resolver
from onnx_asr.preprocessors.numpy_preprocessor import NemoPreprocessorNumpy

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

SHORTEST_SAMPLES = 1600
"""A tenth of a second. The variance of a spectrogram takes two of its steps."""


class Control:
    """What all sessions of a model ask. It holds none of them: a circle would keep the weights."""

    def __init__(self, device: str) -> None:
        self.check: Callable[[], None] = nothing
        """Called before each run of a graph; may raise to stop."""
        self.run_options = onnxruntime.RunOptions()
        if device == "cuda":
            # By default the library keeps the memory of a run.
            self.run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def stop(self) -> None:
        """Make the current run of a graph fail soon. Any thread may call it."""
        self.run_options.terminate = True

    def begin(self, check: Callable[[], None]) -> None:
        """Serve a request. That the last one was stopped is forgotten."""
        self.run_options.terminate = False
        self.check = check

    def end(self) -> None:
        """Let the request go."""
        self.check = nothing


class Session:
    """A session of onnxruntime that checks before each run, and stops within one."""

    def __init__(self, session: onnxruntime.InferenceSession, control: Control) -> None:
        self._session = session
        self._control = control

    def get_inputs(self) -> Any:
        """The inputs of the graph."""
        return self._session.get_inputs()

    def run(self, outputs: Sequence[str], feed: dict[str, Any]) -> Any:
        """Run the graph as the library does."""
        self._control.check()
        return self._session.run(outputs, feed, self._control.run_options)


class OnnxModel:
    """A loaded model."""

    def __init__(
        self, folder: Path, kind: ModelType, quantization: str | None, device: str, threads: int
    ) -> None:
        """Load the graphs.

        Raises:
            LoadFailed: the library cannot compute on this device.

        """
        files = create_asr_resolver(kind, folder, offline=True)
        self.control = Control(device)
        self._asr: Any = files.model_type(
            files.resolve_model(quantization=quantization),
            NemoPreprocessorNumpy,
            {
                "sess_options": _session_options(threads),
                "providers": _providers(device),
                "provider_options": None,
            },
        )
        for name, value in vars(self._asr).items():
            if isinstance(value, onnxruntime.InferenceSession):
                setattr(self._asr, name, Session(value, self.control))
        self._ids = {token: index for index, token in self._asr._vocab.items()}

    @property
    def rate(self) -> int:
        """Hertz of the samples."""
        return int(self._asr._get_sample_rate())

    @property
    def frame_s(self) -> float:
        """Seconds between two frames of the encoder: the steps of `timestamps`."""
        return float(self._asr.window_step * self._asr._subsampling_factor)

    def knows_language(self, language: str) -> bool:
        """Whether there is a token of the language, as Canary has one for each."""
        return f"<|{language}|>" in self._ids

    def token_ids(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """The numbers of tokens."""
        return tuple(self._ids[token] for token in tokens)

    def hear(self, samples: Samples, **arguments: str) -> TimestampedResult:
        """What is said in a window of mono samples. `arguments` are for Canary."""
        import numpy as np

        padded = np.pad(samples, (0, max(0, SHORTEST_SAMPLES - len(samples))))
        lengths = np.array([len(padded)], np.int64)
        heard = self._asr.recognize_batch(padded[None], lengths, need_logprobs=True, **arguments)
        result: TimestampedResult = next(heard)
        return result


def has_provider(device: str) -> bool:
    """Whether onnxruntime, as it is installed, computes on the device."""
    return (CUDA if device == "cuda" else CPU) in onnxruntime.get_available_providers()


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next run by spinning would slow down all other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The weights have memory of their own, so that what runs took can be given back.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return options


def _providers(device: str) -> list[Any]:
    if device != "cuda":
        return [CPU]
    if not has_provider(device):
        raise LoadFailed(f"onnxruntime has no {CUDA}: install onnxruntime-gpu")
    return [(CUDA, {"arena_extend_strategy": "kSameAsRequested"}), (CPU, {})]


def nothing() -> None:
    """The check while no request runs."""
