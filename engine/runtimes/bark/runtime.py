"""Bark, through transformers: speech at 24 kHz with laughter and music in it.

A model is a folder like the repository suno/bark-small. Nothing here imports the library before
`start`; the model itself is in `bark_model`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest, LoadFailed, reason
from engine.files.pickled import load_pickled
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import WANTED_FILES, local_folder, present_folder
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

FILES = (*WANTED_FILES, "*.npy")
"""What is fetched from a hub: the voices are arrays beside the weights."""

LANGUAGES = ("en", "de", "es", "fr", "hi", "it", "ja", "ko", "pl", "pt", "ru", "tr", "zh")
"""What Bark was trained with (its model card). It takes the language from the text."""

NO_VOICE = "default"
"""What a voice of the model's own choosing is called, where its folder has no voices."""

SAMPLE_RATE = 24_000
"""Hertz, of its codec."""

PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
"""The files that make a voice."""

_PRESET = re.compile(r"(?:.*/)?([a-z]{2})_speaker_\d+")


class BarkOptions(SpeechOptions):
    """Options of a Bark model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class BarkRuntime(TorchRuntime):
    """Loads Bark models."""

    name: ClassVar[str] = "bark"
    Options: ClassVar[type[Section]] = BarkOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        super().__init__(device, cache_dir)
        self._voices: dict[str, tuple[Voice, ...]] = {}

    def start(self) -> None:
        """Import torch and transformers (some seconds)."""
        from engine.runtimes.bark import model  # noqa: F401 - for its imports

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice and language; fill in the defaults."""
        asked = check_speech(model, request)
        check_no_clone(model, asked)
        if asked.speed != 1.0:
            raise InvalidRequest(
                f"The model {model.id!r} speaks at its own speed only.", param="speed"
            )
        if model.id not in self._voices:
            folder = present_folder(model.source, self._cache_dir, revision=model.options.revision)
            if folder is None:
                return prepared_speech(asked, None, SAMPLE_RATE)
            self._voices[model.id] = _read_voices(folder)
        return prepared_speech(asked, _utterance(model, self._voices[model.id], asked), SAMPLE_RATE)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The voice presets of the folder, as the library names them."""
        return _read_voices(self._folder(model)) or (Voice(NO_VOICE, NO_VOICE),)

    def _folder(self, model: ModelConfig) -> Path:
        return local_folder(
            model.source, self._cache_dir, revision=model.options.revision, patterns=FILES
        )

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """All safetensors of the folder, else the one pickled file."""
        folder = self._folder(model)
        return sorted(folder.glob("*.safetensors")) or [folder / "pytorch_model.bin"]

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the tensors of the checkpoint by part; fetch the files first if need be."""
        files = self.weight_files(model)
        options: BarkOptions = model.options
        item_bytes = DTYPE_BYTES[options.dtype]
        sizes: defaultdict[str, int] = defaultdict(int)
        if files[0].suffix == ".safetensors":
            try:
                tensors = tensor_sizes(files)
            except (OSError, ValueError) as error:
                raise LoadFailed(f"{files[0].parent.name}: cannot read: {error}") from error
            for name, size in tensors.items():
                sizes[name.partition(".")[0]] += weight_bytes({name: size}, item_bytes)
        else:
            for name, tensor in load_pickled(files[0], device="meta").items():
                width = item_bytes if tensor.is_floating_point() else tensor.element_size()
                sizes[name.partition(".")[0]] += tensor.numel() * width
        parkable = self.host is not None
        blocks = tuple(Block(name, nbytes, parkable) for name, nbytes in sizes.items())
        nbytes = sum(block.nbytes for block in blocks)
        # Disk at 1 GB/s and a second of building; the first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _build(self, model: ModelConfig) -> SpeechModel:
        from engine.runtimes.bark.model import BarkSpeaker

        folder = self._folder(model)
        self._voices[model.id] = _read_voices(folder)
        with GATE.exclusive():
            speaker = BarkSpeaker(folder, model.options, self._device.kind)
        return SpeechModel(speaker, model.id, partial(_utterance, model, self._voices[model.id]))


def _utterance(model: ModelConfig, voices: tuple[Voice, ...], request: SpeechRequest) -> Utterance:
    """The request as the model knows it; without a name, a voice that speaks the language.

    Raises:
        InvalidRequest: naming `voice` or `language`.

    """
    options: BarkOptions = model.options
    language = None
    if request.language or options.language:
        language = choose_language(model, request, LANGUAGES)
    names = [voice.id for voice in voices]
    names.sort(key=lambda name: language is not None and _language(name) != language)
    voice = choose_voice(model, request, names or [NO_VOICE])
    language = language or _language(voice) or "en"
    sentences = split_sentences(request.text, language, max_chars=options.sentence_chars)
    assert request.seed is not None
    return Utterance(tuple(sentences), voice if names else None, language, request.seed)


def _language(voice: str) -> str | None:
    """Of a preset's name, as in `v2/en_speaker_6`."""
    match = _PRESET.fullmatch(voice)
    return primary_language(match[1]) if match else None


def _read_voices(folder: Path) -> tuple[Voice, ...]:
    """The presets whose files are all there.

    Raises:
        LoadFailed: the list of presets is damaged.

    """
    try:
        text = (folder / "speaker_embeddings_path.json").read_text(encoding="utf-8")
        paths = {name: each for name, each in json.loads(text).items() if name != "repo_or_path"}
        return tuple(
            Voice(name, name, _language(name))
            for name, files in paths.items()
            if all((folder / files[prompt]).is_file() for prompt in PROMPTS)
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed(f"{folder.name}: cannot read the voices: {reason(error)}") from error
