"""Coqui TTS: VITS with one voice or many, and XTTS v2 with cloned voices.

Nothing here imports the library before `start`; the models themselves are in
`engine.runtimes.coqui.models`. The weights of XTTS v2 may be used for non-commercial purposes only
(Coqui Public Model License).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.pickled import load_pickled
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.model_folder import PresentFolders
from engine.process.gate import GATE
from engine.requests import Request, SpeechRequest
from engine.runtimes.base import Prepared, RuntimeContext, Voice
from engine.runtimes.common.late_imports import sparing_transformers
from engine.runtimes.common.speech import (
    SpeechModel,
    check_no_clone,
    check_scripts,
    check_speech,
    choose_language,
    choose_or_clone,
    choose_voice,
    prepared_speech,
    primary_language,
)
from engine.runtimes.common.torch_model import TorchRuntime
from engine.runtimes.common.utterance import Utterance
from engine.runtimes.coqui.files import CONFIG_FILE, CoquiFiles, read_folder
from engine.runtimes.coqui.options import CoquiOptions
from engine.runtimes.recognised import Recognised
from engine.section import Section

FILES = ("*.json", "*.pth", "!dvae.pth", "!mel_stats.pth")
"""The files to fetch from a hub. Coqui's weights are pickled, and read with `weights_only`. XTTS is
trained with two more (211 MB) and speaks without them."""

ONLY_VOICE = "default"
"""The name of the voice of a model with one voice. The library has none for it."""

XTTS_CHARS = {"ar": 166, "cs": 186, "hi": 150, "ja": 71, "ko": 95, "ru": 182, "zh": 82}
"""The longest sentence by language, if under 200: `char_limits` of the library's XTTS tokenizer.
A longer sentence may lose the end of its audio."""

XTTS_PACKAGES = {"ja": "cutlet", "ko": "hangul_romanize", "zh": "pypinyin"}
"""The packages that the tokenizer imports at the first sentence of a language."""

UNUSED_PARTS = frozenset({"disc", "posterior_encoder", "speaker_encoder", "mel_stats"})
"""Parts of a checkpoint that are not kept, or too small to count."""


class CoquiRuntime(TorchRuntime):
    """Loads VITS and XTTS models."""

    name: ClassVar[str] = "coqui"
    tasks: ClassVar[tuple[str, ...]] = ("speech",)
    Options: ClassVar[type[Section]] = CoquiOptions

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._files = PresentFolders(context.cache_dir, read_folder, [CONFIG_FILE])

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository. Its weights are always pickled, and read as tensors only."""
        return (HubSource(model.source, FILES, model.options_as(CoquiOptions).revision),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """`config.json` names the kind of model, beside a pickled checkpoint."""
        kind = str(repository.config.get("model", "")).lower()
        if kind not in ("xtts", "vits") or not repository.has(".pth"):
            return None
        return Recognised(cls.name, "speech")

    def start(self) -> None:
        """Import torch, transformers and coqui-tts (some seconds)."""
        with sparing_transformers():
            from engine.runtimes.coqui import models  # noqa: F401 - for its imports

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice, language and speed; fill in the defaults."""
        options = model.options_as(CoquiOptions)
        asked = check_speech(model, options.max_chars, request)
        files = self._files.get(model.source, options.revision)
        if files is None:
            return prepared_speech(asked, None, 0)
        utterance = _utterance(model.id, options, files, asked)
        return prepared_speech(asked, utterance, files.sample_rate)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The speakers by name. Those of XTTS speak every language."""
        files = self._fetched(model)
        one = files.kind == "vits" and len(files.languages) == 1
        language = files.languages[0] if one else None
        if not files.speakers and files.kind == "vits":
            return (Voice(ONLY_VOICE, ONLY_VOICE, language),)
        return tuple(Voice(speaker, speaker, language) for speaker in files.speakers)

    def _fetched(self, model: ModelConfig) -> CoquiFiles:
        """The contents of the folder now. It is fetched first if need be."""
        return read_folder(self._folder(model))

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
        parkable = self.context.host is not None
        blocks = tuple(Block(name, nbytes, parkable) for name, nbytes in sizes.items() if nbytes)
        nbytes = sum(block.nbytes for block in blocks)
        # Disk at 1 GB/s and a second of building. The first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _build(self, model: ModelConfig) -> SpeechModel:
        from engine.runtimes.coqui.models import build

        files = self._fetched(model)
        options = model.options_as(CoquiOptions)
        with GATE.exclusive():
            speaker = build(files, options, self.context.device.kind)
        return SpeechModel(speaker, model.id, partial(_utterance, model.id, options, files))


def _utterance(
    model_id: str, options: CoquiOptions, files: CoquiFiles, request: SpeechRequest
) -> Utterance:
    """The request in the model's terms.

    Raises:
        InvalidRequest: naming `voice`, `language` or `input`.

    """
    language = choose_language(model_id, options, request, files.languages)
    sentence_chars = options.sentence_chars
    if files.kind == "xtts":
        _check_xtts_language(language)
        check_scripts(model_id, request.text, [language] if language else [])
        sentence_chars = min(sentence_chars, XTTS_CHARS.get(primary_language(language or ""), 200))
    sentences = split_sentences(request.text, language or "en", max_chars=sentence_chars)
    assert request.seed is not None
    return Utterance(
        tuple(sentences), _voice(model_id, options, request, files), language, request.seed
    )


def _voice(
    model_id: str, options: CoquiOptions, request: SpeechRequest, files: CoquiFiles
) -> str | None:
    if files.kind == "xtts":
        return choose_or_clone(model_id, options, request, files.speakers)
    check_no_clone(model_id, request)
    voice = choose_voice(model_id, options, request, files.speakers or (ONLY_VOICE,))
    return voice if files.speakers else None


def _check_xtts_language(language: str | None) -> None:
    package = XTTS_PACKAGES.get(primary_language(language or ""))
    if package is not None and find_spec(package) is None:
        raise InvalidRequest(
            f"Speaking {language!r} needs the package {package}, which is not installed here.",
            param="language",
        )
