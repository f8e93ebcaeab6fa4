"""Transcription through onnx-asr: Parakeet and Canary of NVIDIA NeMo, by onnxruntime."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.config import ModelConfig
from engine.errors import (
    LoadFailed,
)
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.memory.block import Block, Estimate
from engine.model_folder import present_folder
from engine.requests import Request, TranscriptionRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.loading import load_on_thread
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.transcription import (
    USUAL_BYTES_PER_S,
    TranscriptionModel,
    check_transcription,
)
from engine.runtimes.onnx_asr.checks import check_kind, check_request
from engine.runtimes.onnx_asr.files import (
    GRAPHS,
    VOCABULARY,
    graph_file,
    model_type,
    wanted_files,
    weight_files,
)
from engine.runtimes.onnx_asr.options import ModelType, OnnxAsrOptions
from engine.runtimes.recognised import Recognised
from engine.section import Section

if TYPE_CHECKING:
    from engine.runtimes.onnx_asr.model import OnnxModel

WINDOW_BYTES_PER_S = 10_000_000
"""Of a window in the encoder, at its widest place: the first convolution of NeMo's FastConformer.

256 channels, 50 frames a second, 64 of 128 mel bands, 4 bytes; input, output and a copy.
"""

RECORDING_BYTES_PER_S = 250_000
"""Host memory of samples while they are decoded, and while pauses are found."""


class LoadedOnnxAsr(TranscriptionModel):
    """One model on a thread of its own, which runs one window at a time."""

    max_concurrency = 1

    def __init__(
        self, model: OnnxModel, kind: ModelType, options: OnnxAsrOptions, weights: Block, name: str
    ) -> None:
        self.model: OnnxModel | None = model
        self.kind = kind
        self.options = options
        self.weights = weights
        self.threads = ThreadPoolExecutor(1, thread_name_prefix=name)

    def blocks(self) -> tuple[Block, ...]:
        """The weights. onnxruntime reports no sizes, and keeps them in the types of the files."""
        return (self.weights,)

    def make_run(self, request: TranscriptionRequest, emit: Emit) -> ThreadRun:
        """Transcribe. A stop is heard within a window as well."""
        from engine.runtimes.onnx_asr.run import Run

        assert self.model is not None
        return Run(self.model, self.kind, self.options, request, emit)


class OnnxAsrRuntime(Runtime):
    """Loads transcription models in ONNX.

    None can be parked: onnxruntime does not take the weights of a session off the device.
    """

    name: ClassVar[str] = "onnx_asr"
    tasks: ClassVar[tuple[str, ...]] = ("transcribe",)
    Options: ClassVar[type[Section]] = OnnxAsrOptions
    repeats_itself: ClassVar[bool] = True

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="onnx-asr-load")

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository, and of it one quantization."""
        options = model.options_as(OnnxAsrOptions)
        return (HubSource(model.source, wanted_files(options), options.revision),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """`config.json` with a `model_type` of onnx-asr's, beside graphs in ONNX.

        Raises:
            LoadFailed: a graph or the vocabulary is missing.

        """
        said = repository.config.get("model_type")
        graphs_of = {str(kind): names for kind, names in GRAPHS.items()}
        if not isinstance(said, str) or said not in graphs_of:
            return None
        if VOCABULARY not in repository.paths:
            raise LoadFailed(f"{repository.name} has no {VOCABULARY}")
        for quantization in (None, "int8"):
            graphs = {graph_file(name, quantization) for name in graphs_of[said]}
            if graphs <= repository.paths:
                options = {} if quantization is None else {"quantization": quantization}
                return Recognised(cls.name, "transcribe", options)
        raise LoadFailed(f"{repository.name} lacks {', '.join(sorted(graphs - repository.paths))}")

    def start(self) -> None:
        """Import onnx-asr, and load the voice activity detector.

        Raises:
            ImportError: a library is missing, or onnxruntime cannot compute on the device.

        """
        from engine.runtimes.onnx_asr.model import CUDA, has_provider
        from engine.runtimes.onnx_asr.run import import_everything

        if not has_provider(self.context.device.kind):
            raise ImportError(f"onnxruntime has no {CUDA}: install onnxruntime-gpu instead of it")
        import_everything()

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check what can be checked without decoding. The kind counts once its file is here."""
        asked = check_transcription(model, request)
        options = model.options_as(OnnxAsrOptions)
        check_request(asked)
        folder = present_folder(model.source, self.context.cache_dir, revision=options.revision)
        kind = None if folder is None else _known_type(folder, options)
        if kind is not None:
            check_kind(asked, options, kind)
        working = self._working_bytes(options, len(asked.audio))
        return Prepared(asked, None, working_bytes=working)

    def _working_bytes(self, options: OnnxAsrOptions, file_bytes: int) -> int:
        seconds = min(options.max_seconds, file_bytes / USUAL_BYTES_PER_S)
        working = min(options.window_s, max(1.0, seconds)) * WINDOW_BYTES_PER_S
        if self.context.device.kind == "cpu":
            working += seconds * RECORDING_BYTES_PER_S
        return int(working)

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The graphs, and their weights where those are in files of their own."""
        return weight_files(self._folder(model), model.options_as(OnnxAsrOptions))

    def estimate(self, model: ModelConfig) -> Estimate:
        """The bytes of the graphs, which are weights but for some kilobytes.

        A model of 215 MB took 228 MB of host memory on a CPU, and gave all of it back.
        """
        nbytes = sum(path.stat().st_size for path in self.weight_files(model))
        # Disk at 1 GB/s and two seconds of planning. The first measured load replaces it.
        return Estimate(blocks=(Block("weights", nbytes),), load_seconds=2.0 + nbytes / 1e9)

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - no model here fails between runs
    ) -> LoadedModel:
        """Read the model on the loading thread."""
        give_back = self.context.device.release_cached
        return await load_on_thread(self._loader, self._build, model, give_back)

    def _build(self, model: ModelConfig) -> LoadedOnnxAsr:
        from engine.runtimes.onnx_asr.model import OnnxModel

        options = model.options_as(OnnxAsrOptions)
        folder = self._folder(model)
        nbytes = sum(path.stat().st_size for path in weight_files(folder, options))
        kind = model_type(folder, options)
        threads = options.cpu_threads or min(4, len(os.sched_getaffinity(0)))
        found = OnnxModel(folder, kind, options.quantization, self.context.device.kind, threads)
        return LoadedOnnxAsr(found, kind, options, Block("weights", nbytes), model.id)

    async def unload(self, loaded: LoadedModel) -> None:
        """Drop the sessions and the thread."""
        assert isinstance(loaded, LoadedOnnxAsr)
        await asyncio.get_running_loop().run_in_executor(self._loader, self._drop, loaded)

    def _drop(self, loaded: LoadedOnnxAsr) -> None:
        # For a moment after a run, its thread still holds the run, and the run the model.
        loaded.threads.shutdown()
        loaded.model = None
        self.context.device.release_cached()

    async def stop(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()


def _known_type(folder: Path, options: OnnxAsrOptions) -> ModelType | None:
    try:
        return model_type(folder, options)
    except LoadFailed:
        return None  # a load says why
