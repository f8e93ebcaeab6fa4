"""Bark, through transformers: speech at 24 kHz with laughter and music in it.

A model is a folder like the repository suno/bark-small. Nothing here imports the library before
`start`; the model itself is in `engine.runtimes.bark.model`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from engine.config import ModelConfig
from engine.errors import LoadFailed, reason
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.pickled import load_pickled
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.model_folder import WANTED_FILES, PresentFolders
from engine.process.gate import GATE
from engine.requests import Request, SpeechRequest
from engine.runtimes.bark.options import BarkOptions
from engine.runtimes.base import Prepared, RuntimeContext, Voice
from engine.runtimes.common.late_imports import sparing_transformers
from engine.runtimes.common.speech import (
    SpeechModel,
    check_no_clone,
    check_own_speed,
    check_scripts,
    check_speech,
    choose_language,
    choose_voice,
    prepared_speech,
    primary_language,
)
from engine.runtimes.common.torch_model import TorchRuntime
from engine.runtimes.common.utterance import Utterance
from engine.runtimes.recognised import Recognised
from engine.section import Section

FILES = (*WANTED_FILES, "*.npy")
"""The files to fetch from a hub. The voices are arrays beside the weights."""

LANGUAGES = ("en", "de", "es", "fr", "hi", "it", "ja", "ko", "pl", "pt", "ru", "tr", "zh")
"""The languages of its training (its model card). Bark takes the language from the text."""

NO_VOICE = "default"
"""The name of the voice that the model itself chooses, if its folder has no voices."""

SAMPLE_RATE = 24_000
"""Hertz; that of its codec."""

PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
"""The files of a voice."""

VOICES_FILE = "speaker_embeddings_path.json"
"""The list of the voices."""

_PRESET = re.compile(r"(?:.*/)?([a-z]{2})_speaker_\d+")


class BarkRuntime(TorchRuntime):
    """Loads Bark models."""

    name: ClassVar[str] = "bark"
    tasks: ClassVar[tuple[str, ...]] = ("speech",)
    Options: ClassVar[type[Section]] = BarkOptions

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._voices = PresentFolders(context.cache_dir, _read_voices, [VOICES_FILE])

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository, with the voices."""
        return (HubSource(model.source, FILES, model.options_as(BarkOptions).revision),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """`config.json` names the type."""
        if str(repository.config.get("model_type") or "") != "bark":
            return None
        return Recognised(cls.name, "speech")

    def start(self) -> None:
        """Import torch and transformers (some seconds)."""
        with sparing_transformers():
            from engine.runtimes.bark import model  # noqa: F401 - for its imports

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice and language; fill in the defaults."""
        options = model.options_as(BarkOptions)
        asked = check_speech(model, options.max_chars, request)
        check_no_clone(model.id, asked)
        check_own_speed(model.id, asked)
        check_scripts(model.id, asked.text, LANGUAGES)
        voices = self._voices.get(model.source, options.revision)
        utterance = None if voices is None else _utterance(model.id, options, voices, asked)
        return prepared_speech(asked, utterance, SAMPLE_RATE)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The voice presets of the folder, as the library names them."""
        return _read_voices(self._folder(model)) or (Voice(NO_VOICE, NO_VOICE),)

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """All safetensors of the folder, otherwise the one pickled file."""
        folder = self._folder(model)
        return sorted(folder.glob("*.safetensors")) or [folder / "pytorch_model.bin"]

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the tensors of the checkpoint by part; fetch the files first if need be."""
        files = self.weight_files(model)
        options = model.options_as(BarkOptions)
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
        parkable = self.context.host is not None
        blocks = tuple(Block(name, nbytes, parkable) for name, nbytes in sizes.items())
        nbytes = sum(block.nbytes for block in blocks)
        # Disk at 1 GB/s and a second of building. The first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _build(self, model: ModelConfig) -> SpeechModel:
        from engine.runtimes.bark.model import BarkSpeaker

        folder = self._folder(model)
        voices = _read_voices(folder)
        options = model.options_as(BarkOptions)
        with GATE.exclusive():
            speaker = BarkSpeaker(folder, options, self.context.device.kind)
        return SpeechModel(speaker, model.id, partial(_utterance, model.id, options, voices))


def _utterance(
    model_id: str, options: BarkOptions, voices: tuple[Voice, ...], request: SpeechRequest
) -> Utterance:
    """The request in the model's terms. If it names no voice, one that speaks the language.

    Raises:
        InvalidRequest: naming `voice` or `language`.

    """
    language = None
    if request.language or options.language:
        language = choose_language(model_id, options, request, LANGUAGES)
    names = [voice.id for voice in voices]
    names.sort(key=lambda name: language is not None and _language(name) != language)
    voice = choose_voice(model_id, options, request, names or [NO_VOICE])
    language = language or _language(voice) or "en"
    sentences = split_sentences(request.text, language, max_chars=options.sentence_chars)
    assert request.seed is not None
    return Utterance(tuple(sentences), voice if names else None, language, request.seed)


def _language(voice: str) -> str | None:
    """The language in a preset's name, as in `v2/en_speaker_6`."""
    match = _PRESET.fullmatch(voice)
    return primary_language(match[1]) if match else None


def _read_voices(folder: Path) -> tuple[Voice, ...]:
    """The presets that have all their files.

    Raises:
        LoadFailed: the list of presets is damaged.

    """
    try:
        text = (folder / VOICES_FILE).read_text(encoding="utf-8")
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
