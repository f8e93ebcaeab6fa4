"""Coqui TTS: VITS with one voice or many, and XTTS v2 with cloned voices.

Nothing here imports the library before `start`; the models themselves are in `coqui_models`.
The weights of XTTS v2 may be used for non-commercial purposes only (Coqui Public Model License).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest, LoadFailed
from engine.files.pickled import load_pickled
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import local_folder, present_folder
from engine.process.gate import GATE
from engine.requests import Request, SpeechRequest
from engine.runtimes.base import Prepared, Voice
from engine.runtimes.common.speech import (
    SpeechModel,
    SpeechOptions,
    Utterance,
    check_no_clone,
    check_speech,
    choose_language,
    choose_voice,
    prepared_speech,
    primary_language,
)
from engine.runtimes.common.torch_model import TorchRuntime
from engine.runtimes.coqui.files import CoquiFiles, read_folder

FILES = ("*.json", "*.pth")
"""What is fetched from a hub. Coqui keeps weights pickled; they are read with `weights_only`."""

ONLY_VOICE = "default"
"""What the voice of a model with one voice is called here; the library has no name for it."""

XTTS_CHARS = {"ar": 166, "cs": 186, "hi": 150, "ja": 71, "ko": 95, "ru": 182, "zh": 82}
"""Of a sentence, where it is under 200: `char_limits` of the library's XTTS tokenizer. Beyond,
the end of the audio may be missing."""

XTTS_PACKAGES = {"ja": "cutlet", "ko": "hangul_romanize", "zh": "pypinyin"}
"""What the tokenizer imports at the first sentence of a language."""

UNUSED_PARTS = frozenset({"disc", "posterior_encoder", "speaker_encoder", "mel_stats"})
"""Of a checkpoint, by the beginning of the names: not kept, or too small to count."""


class CoquiOptions(SpeechOptions):
    """Options of a VITS or XTTS model; the last five are XTTS's, and None is the checkpoint's."""

    stream_chunk_tokens: int = Field(default=20, ge=4)
    """How much is spoken before it is heard: 46 ms each. Less is sooner, and costs more."""
    temperature: float | None = Field(default=None, gt=0, le=2)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1)


class CoquiRuntime(TorchRuntime):
    """Loads VITS and XTTS models."""

    name: ClassVar[str] = "coqui"
    Options: ClassVar[type[Section]] = CoquiOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        super().__init__(device, cache_dir)
        self._files: dict[str, CoquiFiles] = {}

    def start(self) -> None:
        """Import torch, transformers and coqui-tts (some seconds)."""
        from engine.runtimes.coqui import models  # noqa: F401 - for its imports

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice, language and speed; fill in the defaults."""
        asked = check_speech(model, request)
        files = self._present(model)
        if files is None:
            return prepared_speech(asked, None, 0)
        return prepared_speech(asked, _utterance(model, files, asked), files.sample_rate)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The speakers by their names; those of XTTS speak every language."""
        files = self._fetched(model)
        one = files.kind == "vits" and len(files.languages) == 1
        language = files.languages[0] if one else None
        if not files.speakers and files.kind == "vits":
            return (Voice(ONLY_VOICE, ONLY_VOICE, language),)
        return tuple(Voice(speaker, speaker, language) for speaker in files.speakers)

    def _present(self, model: ModelConfig) -> CoquiFiles | None:
        """What the folder holds, if it is here already."""
        if model.id not in self._files:
            folder = present_folder(model.source, self._cache_dir, revision=model.options.revision)
            if folder is None:
                return None
            self._files[model.id] = read_folder(folder)
        return self._files[model.id]

    def _fetched(self, model: ModelConfig) -> CoquiFiles:
        """What the folder holds now; it is fetched first if need be."""
        folder = local_folder(
            model.source, self._cache_dir, revision=model.options.revision, patterns=FILES
        )
        self._files[model.id] = read_folder(folder)
        return self._files[model.id]

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The checkpoint."""
        return (self._fetched(model).checkpoint,)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the shapes in the checkpoint by part; fetch the files first if need be."""
        from engine.runtimes.coqui import models  # noqa: F401 - it knows what XTTS's file holds

        files = self._fetched(model)
        checkpoint = load_pickled(files.checkpoint, device="meta")
        tensors = checkpoint.get("model") if isinstance(checkpoint, dict) else None
        if not isinstance(tensors, dict):
            raise LoadFailed(f"{files.folder.name}/{files.checkpoint.name}: no model in it")
        sizes: defaultdict[str, int] = defaultdict(int)
        for name, tensor in tensors.items():
            part = name.removeprefix("xtts.").partition(".")[0]
            if part not in UNUSED_PARTS:
                sizes[part] += tensor.numel() * tensor.element_size()
        parkable = self.host is not None
        blocks = tuple(Block(name, nbytes, parkable) for name, nbytes in sizes.items() if nbytes)
        nbytes = sum(block.nbytes for block in blocks)
        # Disk at 1 GB/s and a second of building; the first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _build(self, model: ModelConfig) -> SpeechModel:
        from engine.runtimes.coqui.models import build

        files = self._fetched(model)
        with GATE.exclusive():
            speaker = build(files, model.options, self._device.kind)
        return SpeechModel(speaker, model.id, partial(_utterance, model, files))


def _utterance(model: ModelConfig, files: CoquiFiles, request: SpeechRequest) -> Utterance:
    """The request as the model knows it.

    Raises:
        InvalidRequest: naming `voice` or `language`.

    """
    options: CoquiOptions = model.options
    language = choose_language(model, request, files.languages)
    sentence_chars = options.sentence_chars
    if files.kind == "xtts":
        _check_xtts_language(language)
        sentence_chars = min(sentence_chars, XTTS_CHARS.get(primary_language(language or ""), 200))
    sentences = split_sentences(request.text, language or "en", max_chars=sentence_chars)
    assert request.seed is not None
    return Utterance(tuple(sentences), _voice(model, request, files), language, request.seed)


def _voice(model: ModelConfig, request: SpeechRequest, files: CoquiFiles) -> str | None:
    if files.kind != "xtts":
        check_no_clone(model, request)
    if request.voice_sample is not None:
        if not request.voice_sample.is_file():
            raise InvalidRequest("There is no recording of this voice.", param="voice")
        return None
    if not files.speakers and files.kind == "xtts":
        raise InvalidRequest(
            f"The model {model.id!r} has no voices of its own; give a cloned one.",
            param="voice",
        )
    voice = choose_voice(model, request, files.speakers or (ONLY_VOICE,))
    return voice if files.speakers else None


def _check_xtts_language(language: str | None) -> None:
    package = XTTS_PACKAGES.get(primary_language(language or ""))
    if package is not None and find_spec(package) is None:
        raise InvalidRequest(
            f"Speaking {language!r} needs the package {package}, which is not installed here.",
            param="language",
        )
