"""Kokoro: speech at 24 kHz, sentence by sentence.

A model is a folder like the repository hexgrad/Kokoro-82M: `config.json`, one `.pth` file and
`voices/*.pt`. Nothing here imports the library before `start`. The module itself runs in
`engine.runtimes.kokoro.model`; `engine.runtimes.kokoro.phonemes` turns text into what it speaks.

One request at a time. The library aligns one text a call, and a batch would not pay: its vocoder,
where the time goes, took 5.8 s for four inputs of one length at once and 5.2 s one by one (one
CPU thread, float32, medians of four), and real texts would be padded on top.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.media.scripts import find_foreign
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.model_folder import PresentFolders
from engine.process.gate import GATE
from engine.requests import Request
from engine.runtimes.base import Prepared, RuntimeContext, Voice
from engine.runtimes.common.late_imports import sparing_transformers
from engine.runtimes.common.speech import check_no_clone, check_speech, primary_language
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime
from engine.runtimes.kokoro.languages import (
    ESPEAK_SCRIPTS,
    LANGUAGES,
    NEEDS_PACKAGES,
    find_language,
    spoken_languages,
)
from engine.runtimes.kokoro.options import KokoroOptions
from engine.runtimes.kokoro.utterance import Utterance
from engine.runtimes.kokoro.voices import (
    OPENAI_VOICES,
    VOICES_FOLDER,
    Blend,
    find_voices,
    no_voice,
    parse_blend,
    voice_files,
)
from engine.runtimes.recognised import Recognised
from engine.section import Section
from engine.words import echoed

if TYPE_CHECKING:
    from engine.runtimes.kokoro.model import VoiceModel
    from engine.runtimes.kokoro.phonemes import Phonemizer

FILES = ("config.json", "*.pth", "voices/*.pt")
"""The files of a model. They are pickles, and are only read as tensors."""

SENTENCE_CHARS = 400
"""A sentence longer than this is spoken in pieces. It is the library's limit for most languages."""

WORKING_BYTES_PER_CHAR = 2**20
"""A guess for the first run of a shape: some 15 characters a second, of 24,000 samples."""


class KokoroModel(TorchModel["VoiceModel"]):
    """One model on a thread of its own."""

    def __init__(
        self, model: VoiceModel, phonemizer: Phonemizer, folder: Path, model_id: str
    ) -> None:
        super().__init__(model, model_id)
        self._phonemizer = phonemizer
        self._folder = folder

    def make_run(self, prepared: Prepared, emit: Emit) -> ThreadRun:
        """Speak."""
        from engine.runtimes.kokoro.model import KokoroRun

        assert self.model is not None
        utterance: Utterance = prepared.payload
        if not utterance.voices:
            files = voice_files(self._folder)
            utterance = replace(utterance, voices=find_voices(utterance.blend, files))
        return KokoroRun(self.model, self._phonemizer, utterance, prepared.shape, emit)


class KokoroRuntime(TorchRuntime):
    """Loads Kokoro models."""

    name: ClassVar[str] = "kokoro"
    tasks: ClassVar[tuple[str, ...]] = ("speech",)
    Options: ClassVar[type[Section]] = KokoroOptions
    repeats_itself: ClassVar[bool] = True  # a request without a seed has the seed 0

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._phonemizer: Phonemizer | None = None
        self._voices = PresentFolders(context.cache_dir, voice_files, [VOICES_FOLDER])

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository. Its weights are always pickled, and read as tensors only."""
        return (HubSource(model.source, FILES, model.options_as(KokoroOptions).revision),)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """`config.json` describes Kokoro's vocoder, beside a pickled checkpoint."""
        if "istftnet" not in repository.config or not repository.has(".pth"):
            return None
        return Recognised(cls.name, "speech")

    def start(self) -> None:
        """Import torch, spaCy and kokoro, and read the lexicons (some seconds).

        During the import, the libraries of the library set environment variables, warning
        filters and the state of `random`. All are put back. loguru, which only kokoro uses here,
        stays silent.
        """
        environment = dict(os.environ)
        with GATE.exclusive(), warnings.catch_warnings(), sparing_transformers():
            from loguru import logger

            from engine.runtimes.kokoro import model as kokoro_model
            from engine.runtimes.kokoro.phonemes import Phonemizer

            logger.disable("kokoro")
            assert kokoro_model
            self._phonemizer = Phonemizer()
        for variable in os.environ.keys() - environment.keys():
            del os.environ[variable]

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice, language and speed; split the text; fill in the defaults."""
        options = model.options_as(KokoroOptions)
        asked = check_speech(model, options.max_chars, request, default_seed=0)
        check_no_clone(model.id, asked)
        voice = asked.voice or options.voice
        blend = parse_blend(options.resolve(voice))
        files = self._voices.get(model.source, options.revision)
        if blend is None:
            raise no_voice(voice, files)
        voices = () if files is None else find_voices(blend, files)
        language = _language(model.id, options, asked.language, blend)
        _check_script(asked.text, voice, language, options, files)
        sentences = split_sentences(asked.text, language, max_chars=SENTENCE_CHARS)
        longest = max(map(len, sentences))
        # The working memory of a run grows with the seconds of its longest sentence.
        chars = 1 << max(5, round(longest / asked.speed) - 1).bit_length()
        assert asked.seed is not None
        return Prepared(
            replace(asked, voice=voice, language=language),
            Utterance(
                tuple(sentences),
                language,
                blend,
                voices,
                asked.speed,
                asked.seed,
                asked.word_times,
            ),
            working_bytes=chars * WORKING_BYTES_PER_CHAR,
            shape=f"speech-{chars}",
        )

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The files in `voices`, then their names in the configuration."""
        options = model.options_as(KokoroOptions)
        folder = self._folder(model)
        files = voice_files(folder)
        if not files:
            raise LoadFailed(f"{folder.name}: there is no voice in voices/")
        found = [
            Voice(name, name[3:].replace("_", " ").title() or name, options.language_of(name))
            for name in files
        ]
        for alias, target in {**OPENAI_VOICES, **options.voices}.items():
            blend = parse_blend(target)
            if blend is not None and all(name in files for name, _ in blend):
                name = f"{alias.title()} ({target})"
                found.append(Voice(alias, name, options.language_of(blend[0][0])))
        return tuple(found)

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The checkpoint."""
        return (_weights(self._folder(model)),)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the shapes of the checkpoint's tensors; fetch the files first if need be."""
        from engine.runtimes.kokoro.model import NORMS, stored_parts

        sizes = {
            part: sum(each.nbytes for name, each in tensors.items() if not name.endswith(NORMS))
            for part, tensors in stored_parts(_weights(self._folder(model))).items()
        }
        parkable = self.context.host is not None
        blocks = tuple(Block(part, nbytes, parkable) for part, nbytes in sizes.items())
        nbytes = sum(block.nbytes for block in blocks)
        # Building draws first weights in vain, at some 100 MB/s. A measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=0.5 + nbytes / 1e8)

    def _build(self, model: ModelConfig) -> KokoroModel:
        from engine.runtimes.kokoro.model import VoiceModel

        assert self._phonemizer is not None
        folder = self._folder(model)
        weights = _weights(folder)
        with GATE.exclusive():
            made = VoiceModel(folder / "config.json", weights, self.context.device.kind)
        return KokoroModel(made, self._phonemizer, folder, model.id)

    async def stop(self) -> None:
        """End the loading thread and drop the lexicons."""
        await super().stop()
        self._phonemizer = None


def _language(model_id: str, options: KokoroOptions, asked: str | None, blend: Blend) -> str:
    default = options.language_of(blend[0][0]) or options.language
    language = default if asked is None else find_language(asked, default)
    if language is None:
        raise InvalidRequest(
            f"The model {model_id!r} does not speak {echoed(asked)}; it speaks"
            f" {', '.join(spoken_languages())}.",
            param="language",
        )
    if language in NEEDS_PACKAGES:
        raise InvalidRequest(
            f"Speaking {language!r} needs packages that are not part of this server"
            f" (misaki[{language}]).",
            param="language",
        )
    return language


def _check_script(
    text: str,
    voice: str,
    language: str,
    options: KokoroOptions,
    files: Mapping[str, Path] | None,
) -> None:
    """Refuse what the voice would spell as `Chinese letter`.

    Raises:
        InvalidRequest: naming `input`, and voices that speak it.

    """
    foreign = find_foreign(text, [primary_language(language)], also=ESPEAK_SCRIPTS)
    if foreign is None:
        return
    speaking = [each for each in LANGUAGES.values() if primary_language(each) in foreign.languages]
    names = [name for name in files or () if options.language_of(name) in set(speaking)]
    if not speaking:
        others = "No voice of this model speaks it."
    elif set(speaking) <= set(NEEDS_PACKAGES):
        packages = ", ".join(f"misaki[{each}]" for each in speaking)
        others = (
            f"Only voices of {' and '.join(speaking)} speak it. They need packages that are not"
            f" part of this server ({packages})."
        )
    else:
        others = f"Voices of {' and '.join(speaking)} speak it: {', '.join(names[:8]) or 'none'}."
    raise InvalidRequest(
        f"The voice {voice!r} speaks {language} and cannot speak {foreign.text[:20]!r}. {others}",
        param="input",
    )


def _weights(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise LoadFailed(f"{folder.name}: no config.json")
    found = sorted(folder.glob("*.pth"))
    if len(found) != 1:
        raise LoadFailed(f"{folder.name}: {len(found) or 'no'} .pth files, not one")
    return found[0]
