"""Who speaks when: a segmentation model by onnxruntime, voices compared by sherpa-onnx."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Event
from engine.files.hub.selection import HubSource
from engine.memory.block import Block, Estimate
from engine.requests import DiarizationRequest, Request
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.loading import load_on_thread
from engine.runtimes.common.thread_run import run_on_thread
from engine.runtimes.common.transcription import USUAL_BYTES_PER_S, library_error
from engine.runtimes.sherpa_diarization.files import check_file, hub_sources
from engine.runtimes.sherpa_diarization.options import SherpaDiarizationOptions
from engine.section import Section

if TYPE_CHECKING:
    from engine.runtimes.sherpa_diarization.model import DiarizationModel

WINDOW_BYTES = 120_000_000
"""Of ten seconds in either model, at the widest place: the first layers of a ResNet34.

32 channels, 1000 frames, 80 bands, 4 bytes; some ten of them at once.
"""

RECORDING_BYTES_PER_S = 250_000
"""Samples while they are decoded, and who speaks in each frame of each window."""

VOICES_PER_S = 3
"""The most speakers of a window, and a window begins each second."""


class LoadedDiarization(LoadedModel):
    """Both models, on a thread of their own."""

    max_concurrency = 1

    def __init__(
        self,
        model: DiarizationModel,
        options: SherpaDiarizationOptions,
        blocks: tuple[Block, ...],
        name: str,
    ) -> None:
        self.model: DiarizationModel | None = model
        self.options = options
        self._blocks = blocks
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def blocks(self) -> tuple[Block, ...]:
        """The weights of each model. The libraries report no sizes."""
        return self._blocks

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Say who speaks when; closing the generator stops it, also within a window."""
        from engine.runtimes.sherpa_diarization.run import Run

        assert self.model is not None
        assert isinstance(prepared.request, DiarizationRequest)
        make_run = partial(Run, self.model, self.options, prepared.request)
        # Both libraries compute on threads of their own.
        running = run_on_thread(self.thread, make_run, library_error, helpers=True)
        async with aclosing(running) as events:
            async for event in events:
                yield event


class SherpaDiarizationRuntime(Runtime):
    """Loads models that tell speakers apart. They compute on the processor, also beside a GPU.

    None can be parked: neither library takes weights away and keeps the rest.
    """

    name: ClassVar[str] = "sherpa_diarization"
    tasks: ClassVar[tuple[str, ...]] = ("diarize",)
    Options: ClassVar[type[Section]] = SherpaDiarizationOptions
    repeats_itself: ClassVar[bool] = True

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="diarization-load")

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """Where its two files come from."""
        return hub_sources(model)

    def start(self) -> None:
        """Import both libraries.

        Raises:
            ImportError: one is missing.

        """
        import engine.runtimes.sherpa_diarization.run  # noqa: F401

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check what can be checked without decoding."""
        if not isinstance(request, DiarizationRequest):
            raise InvalidRequest(
                f"The model {model.id!r} does not support {request.operation.value}.",
                param="model",
            )
        if not request.audio:
            raise InvalidRequest("The file is empty.", param="file")
        working = self._working_bytes(model, len(request.audio))
        return Prepared(request, None, working_bytes=working)

    def _working_bytes(self, model: ModelConfig, file_bytes: int) -> int:
        """What a run takes: a window, the recording, and the distances between all voices.

        Nothing of it is on a GPU.
        """
        if self.context.device.kind != "cpu":
            return 0
        options = model.options_as(SherpaDiarizationOptions)
        seconds = min(options.max_seconds, file_bytes / USUAL_BYTES_PER_S)
        distances = (VOICES_PER_S * seconds) ** 2 / 2 * 8
        return int(WINDOW_BYTES + seconds * RECORDING_BYTES_PER_S + distances)

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The file of each model."""
        options = model.options_as(SherpaDiarizationOptions)
        folders = [self._folder_of(source) for source in hub_sources(model)]
        return (
            check_file(folders[0] / options.segmentation),
            check_file(folders[-1] / options.embedding),
        )

    def estimate(self, model: ModelConfig) -> Estimate:
        """The bytes of the files, which are weights but for some kilobytes."""
        paths = self.weight_files(model)
        nbytes = sum(path.stat().st_size for path in paths)
        # Disk at 1 GB/s and a second of planning. The first measured load replaces it.
        return Estimate(blocks=self._blocks(paths), load_seconds=1.0 + nbytes / 1e9)

    def _blocks(self, paths: Sequence[Path]) -> tuple[Block, ...]:
        if self.context.device.kind != "cpu":
            return ()
        names = ("segmentation", "embedding")
        return tuple(
            Block(name, path.stat().st_size) for name, path in zip(names, paths, strict=True)
        )

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - no model here fails between runs
    ) -> LoadedModel:
        """Read the models on the loading thread."""
        give_back = self.context.device.release_cached
        return await load_on_thread(self._loader, self._build, model, give_back)

    def _build(self, model: ModelConfig) -> LoadedDiarization:
        from engine.runtimes.sherpa_diarization.model import DiarizationModel

        options = model.options_as(SherpaDiarizationOptions)
        segmentation, embedding = self.weight_files(model)
        threads = options.cpu_threads or min(4, len(os.sched_getaffinity(0)))
        found = DiarizationModel(segmentation, embedding, threads)
        return LoadedDiarization(found, options, self._blocks((segmentation, embedding)), model.id)

    async def unload(self, loaded: LoadedModel) -> None:
        """Drop both models and the thread."""
        assert isinstance(loaded, LoadedDiarization)
        await asyncio.get_running_loop().run_in_executor(self._loader, self._drop, loaded)

    def _drop(self, loaded: LoadedDiarization) -> None:
        # For a moment after a run, its thread still holds the run, and the run the model.
        loaded.thread.shutdown()
        loaded.model = None
        self.context.device.release_cached()

    async def stop(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()
