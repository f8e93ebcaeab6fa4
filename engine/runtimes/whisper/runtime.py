"""faster-whisper: transcription with Whisper models that CTranslate2 runs.

Any model folder or hub repository in CTranslate2's format. Nothing here imports the library
before `start`; the runs themselves are in `engine.runtimes.whisper.run`.

Loads and runs do without the gate. CTranslate2 has threads, memory and an OpenMP of its own and
lets go of the interpreter while it computes; faster-whisper around it is NumPy on local arrays.
Neither reads nor changes what the gate guards: torch and the global random generators.

On CUDA a model is parked by CTranslate2's own calls, which keep its weights in host memory from the
first time on. This was written after its documentation and source, and not run on a GPU. On a CPU
the model is in host memory anyway, so it is only loaded and unloaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.config import ModelConfig
from engine.errors import (
    InvalidRequest,
    LoadFailed,
    OutOfDeviceMemory,
    reason,
)
from engine.files.ctranslate2_file import Variable, read_variables, weight_bytes
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.memory.block import Block, Estimate
from engine.model_folder import PresentFolders
from engine.requests import Request, TranscriptionRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.loading import load_on_thread
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.transcription import (
    USUAL_BYTES_PER_S,
    TranscriptionModel,
    check_transcription,
    library_error,
)
from engine.runtimes.recognised import Recognised
from engine.runtimes.whisper.options import WhisperOptions, run_compute_type, run_max_batch
from engine.runtimes.whisper.window_batcher import WindowBatcher
from engine.section import Section
from engine.words import echoed

if TYPE_CHECKING:
    from engine.runtimes.whisper.run import CancellableWhisper


MODEL_FILE = "model.bin"

FILES = (MODEL_FILE, "*.json", "*.txt")
"""The files to fetch from a hub: CTranslate2's own format, which has no pickles."""

AUDIO_FRAMES = 1500
"""Positions that the encoder makes of one window of 30 s."""

TEXT_POSITIONS = 448
"""The most tokens of a window, prompt included."""

LARGE = (1280, 32)
"""Width and decoder layers of the largest models, assumed as long as the files are not here."""

FEATURE_BYTES_PER_S = 1_100_000
"""Measured host memory of samples and spectra during the making of a recording's features."""

BATCHED_BYTES_PER_S = 250_000
"""The same for the batched pipeline, which makes them window by window."""


class LoadedWhisper(TranscriptionModel):
    """One model, whose runs each have a thread and share the calls of a batcher."""

    def __init__(
        self,
        model: CancellableWhisper,
        options: WhisperOptions,
        weights: Block,
        max_batch: int,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.model: CancellableWhisper | None = model
        self.options = options
        self.weights = weights
        self.batcher = WindowBatcher(max_batch)
        self._max_concurrency = max_batch
        self.threads = threads

    @property
    def max_concurrency(self) -> int:
        """As many runs as a batch may have windows."""
        return self._max_concurrency

    def blocks(self) -> tuple[Block, ...]:
        """The weights in their loaded type. CTranslate2 reports no sizes."""
        return (self.weights,)

    @property
    def host_bytes(self) -> int:
        """Bytes that CTranslate2 keeps in host memory once the model was parked."""
        return self.weights.nbytes if self.weights.parkable else 0

    def make_run(self, request: TranscriptionRequest, emit: Emit) -> ThreadRun:
        """Transcribe."""
        from engine.runtimes.whisper.run import Run

        assert self.model is not None
        return Run(self.model, self.batcher, self.options, request, emit)


class WhisperRuntime(Runtime):
    """Loads Whisper models."""

    name: ClassVar[str] = "whisper"
    tasks: ClassVar[tuple[str, ...]] = ("transcribe",)
    Options: ClassVar[type[Section]] = WhisperOptions

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="whisper-load")
        self._languages: frozenset[str] = frozenset()
        self._shapes = PresentFolders(context.cache_dir, _read_shape, [MODEL_FILE])

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository."""
        return (HubSource(model.source, FILES, model.options_as(WhisperOptions).revision),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """`config.json` beside `model.bin` is a model of CTranslate2's.

        Raises:
            LoadFailed: it is another model of CTranslate2's, lacks its tokenizer, or is a Whisper
                in the format of transformers.

        """
        config = repository.config
        if "config.json" in repository.paths and MODEL_FILE in repository.paths:
            if "alignment_heads" not in config and "lang_ids" not in config:
                raise LoadFailed(f"{repository.name} is a model of CTranslate2's, but no Whisper")
            if "tokenizer.json" not in repository.paths:
                raise LoadFailed(
                    f"{repository.name} has no tokenizer.json; convert the model with"
                    " --copy_files tokenizer.json preprocessor_config.json"
                )
            return Recognised(cls.name, "transcribe")
        if config.get("model_type") == "whisper":
            raise LoadFailed(
                f"{repository.name} is a Whisper of transformers' format: take one of"
                " CTranslate2's, such as Systran/faster-whisper-small, or convert it with"
                " ct2-transformers-converter"
            )
        return None

    def start(self) -> None:
        """Import faster-whisper and load its voice activity detector (2 MB)."""
        from engine.runtimes.whisper.run import import_everything

        self._languages = import_everything()
        logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # it logs every request

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check what can be checked without decoding; fill in the language."""
        asked = check_transcription(model, request)
        options = model.options_as(WhisperOptions)
        language = asked.language or options.language
        if language is not None:
            language = language.lower()
            if language not in self._languages:
                raise InvalidRequest(
                    f"There is no language {echoed(language)}; two letters are wanted, as in 'en'"
                    " (ISO 639-1).",
                    param="language",
                )
        working = self._working_bytes(model, len(asked.audio))
        return Prepared(replace(asked, language=language), None, working_bytes=working)

    def _working_bytes(self, model: ModelConfig, file_bytes: int) -> int:
        """The working memory of the running windows, and on a CPU of the recording as well.

        A window is in the encoder (twelve tensors of the model's width and the attention of one
        head for every 64 of it, at the peak) or in the decoder (keys and values of all frames
        once and of all tokens for each beam).
        """
        options = model.options_as(WhisperOptions)
        width, layers = self._shape(model.source, options)
        seconds = min(options.max_seconds, file_bytes / USUAL_BYTES_PER_S)
        batched = options.batch_after is not None and seconds > options.batch_after
        encoder = AUDIO_FRAMES * (12 * width + width // 64 * AUDIO_FRAMES)
        decoder = layers * 2 * width * (AUDIO_FRAMES + options.beam_size * TEXT_POSITIONS)
        item_bytes = 2 if self._compute_type(options).endswith("16") else 4
        working = max(encoder, decoder) * item_bytes * (options.batch_size if batched else 1)
        if self.context.device.kind == "cpu":
            per_second = BATCHED_BYTES_PER_S if batched else FEATURE_BYTES_PER_S
            # The library pads recordings that are shorter than a window.
            working += int(max(30.0, seconds) * per_second)
        return working

    def _shape(self, source: str, options: WhisperOptions) -> tuple[int, int]:
        """Width and decoder layers, if the files are here already."""
        try:
            return self._shapes.get(source, options.revision) or LARGE
        except (OSError, ValueError, KeyError):
            return LARGE

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The one file that CTranslate2 reads."""
        return (self._folder(model) / MODEL_FILE,)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Read the header of `model.bin`; fetch the files first if need be."""
        folder = self._folder(model)
        variables = _variables(folder)
        nbytes = weight_bytes(variables, self._compute_type(model.options_as(WhisperOptions)))
        # Disk at 1 GB/s and half a second of building. The first measured load replaces it.
        seconds = 0.5 + (folder / MODEL_FILE).stat().st_size / 1e9
        return Estimate(blocks=(self._block(nbytes),), load_seconds=seconds)

    def _block(self, nbytes: int) -> Block:
        parkable = self.context.device.kind == "cuda" and self.context.host is not None
        return Block("weights", nbytes, parkable)

    def _compute_type(self, options: WhisperOptions) -> str:
        return run_compute_type(options, self.context.device.kind)

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - no model here fails between runs
    ) -> LoadedModel:
        """Read the model on the loading thread."""
        give_back = self.context.device.release_cached
        return await load_on_thread(self._loader, self._build, model, give_back)

    def _build(self, model: ModelConfig) -> LoadedWhisper:
        from engine.runtimes.whisper.run import CancellableWhisper

        options = model.options_as(WhisperOptions)
        folder = self._folder(model)
        variables = _variables(folder)
        if not (folder / "tokenizer.json").is_file():
            # The library would fetch that of another model.
            raise LoadFailed(f"{folder.name}: no tokenizer.json")
        whisper = CancellableWhisper(
            str(folder),
            device=self.context.device.kind,
            compute_type=self._compute_type(options),
            cpu_threads=options.cpu_threads or min(4, len(os.sched_getaffinity(0))),
            local_files_only=True,
        )
        # The library replaced types that the processor lacks.
        nbytes = weight_bytes(variables, whisper.model.compute_type)
        max_batch = run_max_batch(options, self.context.device.kind)
        threads = ThreadPoolExecutor(max_batch, thread_name_prefix=model.id)
        return LoadedWhisper(whisper, options, self._block(nbytes), max_batch, threads)

    async def park(
        self,
        loaded: LoadedModel,
        blocks: Collection[str],  # noqa: ARG002 - there is one
    ) -> None:
        """Have CTranslate2 move the weights to host memory, where they stay from then on.

        Raises:
            RuntimeFailed: it kept them.

        """
        assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
        await asyncio.get_running_loop().run_in_executor(self._loader, self._park, loaded.model)

    def _park(self, model: CancellableWhisper) -> None:
        model.leave_device(to_host=True)
        self.context.device.release_weights()

    async def wake(
        self,
        loaded: LoadedModel,
        blocks: Collection[str],  # noqa: ARG002 - there is one
    ) -> None:
        """Have CTranslate2 copy the weights back.

        Raises:
            OutOfDeviceMemory: there is no room.
            LoadFailed: it could not.

        """
        assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
        loop = asyncio.get_running_loop()
        library = loaded.model.model
        try:
            await loop.run_in_executor(self._loader, partial(library.load_model, keep_cache=True))
        except Exception as error:
            known = library_error(error)
            if isinstance(known, OutOfDeviceMemory):
                raise known from error
            raise LoadFailed(reason(error)) from error

    async def unload(self, loaded: LoadedModel) -> None:
        """Drop the weights, the library's worker and the thread."""
        assert isinstance(loaded, LoadedWhisper)
        await asyncio.get_running_loop().run_in_executor(self._loader, self._drop, loaded)

    def _drop(self, loaded: LoadedWhisper) -> None:
        assert loaded.model is not None
        # For a moment after a run, its thread still holds the run, and the run the model.
        loaded.threads.shutdown()
        loaded.model.model.unload_model()
        loaded.model = None
        self.context.device.release_cached()

    async def stop(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()


def _read_shape(folder: Path) -> tuple[int, int]:
    """Width and decoder layers of a model.

    Raises:
        OSError, ValueError, KeyError: it is not a readable Whisper model.

    """
    variables = read_variables(folder / MODEL_FILE)
    width: int = variables["encoder/conv1/weight"].shape[0]
    layers = {name.split("/")[1] for name in variables if name.startswith("decoder/layer_")}
    return width, len(layers - {"layer_norm"})


def _variables(folder: Path) -> dict[str, Variable]:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise LoadFailed(f"{folder.name}: no model.bin, so no model in CTranslate2's format")
    try:
        variables = read_variables(path)
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{folder.name}: cannot read model.bin: {error}") from error
    if "encoder/conv1/weight" not in variables:
        raise LoadFailed(f"{folder.name}: model.bin holds no Whisper model")
    return variables
