"""faster-whisper: transcription with Whisper models that CTranslate2 runs.

Any model folder or hub repository in CTranslate2's format. Nothing here imports the library
before `start`; the runs themselves are in `whisper_run`.

Loads and runs do without the gate. CTranslate2 has threads, memory and an OpenMP of its own and
lets go of the interpreter while it computes; faster-whisper around it is NumPy on local arrays.
Neither reads nor changes what the gate guards: torch and the global random generators.

On CUDA a model is parked by CTranslate2's own calls, which keep its weights in host memory from the
first time on; written after its documentation and source, not run on a card. On a CPU the host's
memory is where the model is, so there it is only loaded and unloaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from engine.config import ModelConfig, Section
from engine.errors import (
    EngineError,
    InvalidRequest,
    LoadFailed,
    OutOfDeviceMemory,
    RuntimeFailed,
    reason,
)
from engine.events import Event
from engine.files.ctranslate2_file import Variable, read_variables, weight_bytes
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import local_folder, present_folder
from engine.requests import Request, TranscriptionRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime
from engine.runtimes.common.thread_run import run_on_thread
from engine.units import Duration

if TYPE_CHECKING:
    from engine.runtimes.whisper.run import CancellableWhisper

ComputeType = Literal[
    "auto",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
]

FILES = ("model.bin", "*.json", "*.txt")
"""What is fetched from a hub: CTranslate2's own format; nothing in it is pickled."""

AUDIO_FRAMES = 1500
"""Positions that the encoder makes of one window of 30 s."""

TEXT_POSITIONS = 448
"""Tokens that a window can have at most, the prompt with them."""

LARGE = (1280, 32)
"""Width and decoder layers of the largest models, taken while the files are not here."""

USUAL_BYTES_PER_S = 8000
"""Of a compressed recording (64 kbit/s): what its length is guessed from before it is decoded."""

FEATURE_BYTES_PER_S = 1_100_000
"""Host memory of samples and spectra while the features of a recording are made, measured."""

BATCHED_BYTES_PER_S = 250_000
"""The same in the batched pipeline, which makes them window by window."""


class WhisperOptions(Section):
    """Options of a transcription model."""

    compute_type: ComputeType = "auto"
    """What the weights are turned into. `auto`: int8 on a CPU, float16 on a GPU."""
    revision: str | None = None
    language: str | None = None
    """Taken where a request names none; None lets the model find out."""
    beam_size: int = Field(default=5, ge=1, le=100)
    cpu_threads: int | None = Field(default=None, ge=1)
    """None: the processor's cores, four at most."""
    batch_after: Duration | None = 600.0
    """Seconds beyond which a recording goes through the batched pipeline; None: none does.

    It is cut where nobody speaks, whether the request asks for `vad` or not, and several windows
    run at once. They do not see the text before them, and are not tried again at a higher
    temperature.
    """
    batch_size: int = Field(default=8, ge=1, le=256)
    """Windows at once in the batched pipeline."""
    max_seconds: float = Field(default=4 * 3600.0, gt=0)
    """Of a recording; a longer one is refused."""


class LoadedWhisper(LoadedModel):
    """One model on a thread of its own.

    One run at a time: the windows of two would wait for the same CTranslate2 worker. Windows of
    several requests in one batch gain nothing on a CPU (four short recordings with tiny-whisper
    on two cores: 0.7 to 1.1 s one after another, 0.8 to 1.0 s together), and would give up the
    temperature fallback.
    """

    max_concurrency = 1

    def __init__(
        self,
        model: CancellableWhisper,
        options: WhisperOptions,
        weights: Block,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.model: CancellableWhisper | None = model
        self.options = options
        self.weights = weights
        self.thread = thread

    def blocks(self) -> tuple[Block, ...]:
        """The weights in the type they were loaded in; CTranslate2 tells no sizes."""
        return (self.weights,)

    @property
    def host_bytes(self) -> int:
        """What CTranslate2 keeps in host memory once the model was parked."""
        return self.weights.nbytes if self.weights.parkable else 0

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Transcribe; closing the generator stops it at the next window."""
        from engine.runtimes.whisper.run import Run

        assert self.model is not None
        assert isinstance(prepared.request, TranscriptionRequest)
        make_run = partial(Run, self.model, self.options, prepared.request)
        # CTranslate2 computes on threads of its own.
        running = run_on_thread(self.thread, make_run, _translate, helpers=True)
        async with aclosing(running) as events:
            async for event in events:
                yield event


class WhisperRuntime(Runtime):
    """Loads Whisper models."""

    name: ClassVar[str] = "whisper"
    Options: ClassVar[type[Section]] = WhisperOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        self._device = device
        self._cache_dir = cache_dir
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="whisper-load")
        self._languages: frozenset[str] = frozenset()
        self._shapes: dict[str, tuple[int, int]] = {}

    def start(self) -> None:
        """Import faster-whisper and load its voice activity detector (2 MB)."""
        from engine.runtimes.whisper.run import import_everything

        self._languages = import_everything()
        logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # it tells of every request

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check what can be checked without decoding; fill in the language."""
        if model.task != "transcribe" or not isinstance(request, TranscriptionRequest):
            raise InvalidRequest(
                f"The model {model.id!r} does not support {request.operation.value}.",
                param="model",
            )
        options: WhisperOptions = model.options
        if not request.audio:
            raise InvalidRequest("The file is empty.", param="file")
        if not (isfinite(request.temperature) and 0 <= request.temperature <= 1):
            raise InvalidRequest("temperature must be from 0 to 1.", param="temperature")
        language = request.language or options.language
        if language is not None:
            language = language.lower()
            if language not in self._languages:
                raise InvalidRequest(
                    f"There is no language {language!r}; two letters are wanted, as in 'en'"
                    " (ISO 639-1).",
                    param="language",
                )
        working = self._working_bytes(model, len(request.audio))
        return Prepared(replace(request, language=language), None, working_bytes=working)

    def _working_bytes(self, model: ModelConfig, file_bytes: int) -> int:
        """What the windows under way take, and on a CPU the recording as well.

        A window is in the encoder (twelve tensors of the model's width and the attention of one
        head for every 64 of it, at the peak) or in the decoder (keys and values of all frames
        once and of all tokens for each beam).
        """
        options: WhisperOptions = model.options
        width, layers = self._shape(model)
        seconds = min(options.max_seconds, file_bytes / USUAL_BYTES_PER_S)
        batched = options.batch_after is not None and seconds > options.batch_after
        encoder = AUDIO_FRAMES * (12 * width + width // 64 * AUDIO_FRAMES)
        decoder = layers * 2 * width * (AUDIO_FRAMES + options.beam_size * TEXT_POSITIONS)
        item_bytes = 2 if self._compute_type(options).endswith("16") else 4
        working = max(encoder, decoder) * item_bytes * (options.batch_size if batched else 1)
        if self._device.kind == "cpu":
            per_second = BATCHED_BYTES_PER_S if batched else FEATURE_BYTES_PER_S
            # The library fills up what is shorter than a window.
            working += int(max(30.0, seconds) * per_second)
        return working

    def _shape(self, model: ModelConfig) -> tuple[int, int]:
        """Width and decoder layers, where the files are here already."""
        if model.id not in self._shapes:
            folder = present_folder(model.source, self._cache_dir, revision=model.options.revision)
            try:
                variables = read_variables(folder / "model.bin") if folder else {}
                width = variables["encoder/conv1/weight"].shape[0]
            except (OSError, ValueError, KeyError):
                return LARGE
            layers = {name.split("/")[1] for name in variables if name.startswith("decoder/layer_")}
            self._shapes[model.id] = (width, len(layers - {"layer_norm"}))
        return self._shapes[model.id]

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The one that CTranslate2 reads."""
        return (self._folder(model) / "model.bin",)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Read the header of `model.bin`; fetch the files first if need be."""
        folder = self._folder(model)
        variables = _variables(folder)
        nbytes = weight_bytes(variables, self._compute_type(model.options))
        # Disk at 1 GB/s and half a second of building; the first measured load replaces it.
        seconds = 0.5 + (folder / "model.bin").stat().st_size / 1e9
        return Estimate(blocks=(self._block(nbytes),), load_seconds=seconds)

    def _block(self, nbytes: int) -> Block:
        parkable = self._device.kind == "cuda" and self.host is not None
        return Block("weights", nbytes, parkable)

    def _folder(self, model: ModelConfig) -> Path:
        return local_folder(
            model.source, self._cache_dir, revision=model.options.revision, patterns=FILES
        )

    def _compute_type(self, options: WhisperOptions) -> str:
        if options.compute_type != "auto":
            return options.compute_type
        return "float16" if self._device.kind == "cuda" else "int8"

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - a model has no life of its own
    ) -> LoadedModel:
        """Read the model on the loading thread."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._loader, self._build, model)
        except Exception as error:
            await loop.run_in_executor(self._loader, self._device.release_cached)
            if isinstance(error, EngineError):
                raise
            raise LoadFailed(reason(error)) from error

    def _build(self, model: ModelConfig) -> LoadedWhisper:
        from engine.runtimes.whisper.run import CancellableWhisper

        options: WhisperOptions = model.options
        folder = self._folder(model)
        variables = _variables(folder)
        if not (folder / "tokenizer.json").is_file():
            # The library would go and fetch that of another model.
            raise LoadFailed(f"{folder.name}: no tokenizer.json")
        whisper = CancellableWhisper(
            str(folder),
            device=self._device.kind,
            compute_type=self._compute_type(options),
            cpu_threads=options.cpu_threads or min(4, len(os.sched_getaffinity(0))),
            local_files_only=True,
        )
        # What the processor cannot do was turned into what it can.
        nbytes = weight_bytes(variables, whisper.model.compute_type)
        thread = ThreadPoolExecutor(1, thread_name_prefix=model.id)
        return LoadedWhisper(whisper, options, self._block(nbytes), thread)

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
        self._device.release_weights()

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
            known = _translate(error)
            if isinstance(known, OutOfDeviceMemory):
                raise known from error
            raise LoadFailed(reason(error)) from error

    async def unload(self, loaded: LoadedModel) -> None:
        """Drop the weights, the library's worker and the thread."""
        assert isinstance(loaded, LoadedWhisper)
        await asyncio.get_running_loop().run_in_executor(self._loader, self._drop, loaded)

    def _drop(self, loaded: LoadedWhisper) -> None:
        assert loaded.model is not None
        # A thread that has just ended a run still holds it, and it the model, for a moment.
        loaded.thread.shutdown()
        loaded.model.model.unload_model()
        loaded.model = None
        self._device.release_cached()

    async def stop(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()


def _variables(folder: Path) -> dict[str, Variable]:
    path = folder / "model.bin"
    if not path.is_file():
        raise LoadFailed(f"{folder.name}: no model.bin, so no model in CTranslate2's format")
    try:
        variables = read_variables(path)
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{folder.name}: cannot read model.bin: {error}") from error
    if "encoder/conv1/weight" not in variables:
        raise LoadFailed(f"{folder.name}: model.bin holds no Whisper model")
    return variables


def _translate(error: Exception) -> EngineError:
    # CTranslate2 has one exception for everything.
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return OutOfDeviceMemory(f"The device ran out of memory: {reason(error)}")
    return RuntimeFailed(f"The model failed while running: {reason(error)}")
