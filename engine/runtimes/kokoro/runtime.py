"""Kokoro: speech at 24 kHz, sentence by sentence.

A model is a folder like the repository hexgrad/Kokoro-82M: `config.json`, one `.pth` file and
`voices/*.pt`. Nothing here imports the library before `start`; the module itself runs in
`kokoro_model`, and `kokoro_phonemes` turns text into what it speaks.

One request at a time. The library aligns one text a call, and a batch would not pay: its vocoder,
where the time goes, took 5.8 s for four inputs of one length at once and 5.2 s one by one (one
CPU thread, float32, medians of four), and real texts would be padded on top.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest, LoadFailed
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import local_folder, present_folder
from engine.process.gate import GATE
from engine.requests import Request
from engine.runtimes.base import Prepared, Voice
from engine.runtimes.common.speech import check_no_clone, check_speech
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime

if TYPE_CHECKING:
    from engine.runtimes.kokoro.model import VoiceModel
    from engine.runtimes.kokoro.phonemes import Phonemizer

FILES = ("config.json", "*.pth", "voices/*.pt")
"""What a model is made of. They are pickles, which are only ever read as tensors."""

SENTENCE_CHARS = 400
"""A sentence longer than this is spoken in pieces; the library's own limit for most languages."""

WORKING_BYTES_PER_CHAR = 2**20
"""A guess for the first run of a shape: some 15 characters a second, 24,000 samples in it."""

MAX_BLEND = 8

OPENAI_VOICES = {
    "alloy": "af_alloy",
    "ash": "am_adam",
    "ballad": "bm_george",
    "coral": "af_bella",
    "echo": "am_echo",
    "fable": "bm_fable",
    "onyx": "am_onyx",
    "nova": "af_nova",
    "sage": "af_sarah",
    "shimmer": "af_sky",
    "verse": "am_michael",
}
"""Six of OpenAI's names are Kokoro's too; the others go to a voice of the same kind."""

LANGUAGES = {
    "a": "en-us",
    "b": "en-gb",
    "e": "es",
    "f": "fr-fr",
    "h": "hi",
    "i": "it",
    "j": "ja",
    "p": "pt-br",
    "z": "zh",
}
"""By the first letter of a voice's name, as in `af_heart`."""

NEEDS_PACKAGES = ("ja", "zh")
"""Kokoro's languages whose phonemes need packages that Roundhouse does not bring."""

_BLEND_PART = re.compile(r"([A-Za-z0-9_-]+)(?:\((\d{1,6}(?:\.\d{1,6})?)\))?")

Blend = tuple[tuple[str, float], ...]
"""Voices and their weights."""


class KokoroOptions(Section):
    """Options of a Kokoro model."""

    voice: str = "af_heart"
    """What speaks where the request does not say: a voice, an alias or a blend."""
    voices: dict[str, str] = Field(default_factory=dict)
    """Further names for voices or blends, beside those of `OPENAI_VOICES`."""
    dtype: Literal["float32"] = "float32"
    """The vocoder's Fourier transform knows no half precision."""
    language: str = "en-us"
    """Of voices whose name does not tell theirs."""
    max_chars: int = Field(default=4096, ge=1, le=10_000_000)
    """Of one request; 4096 is OpenAI's bound."""
    revision: str | None = None

    @field_validator("language")
    @classmethod
    def _language_is_known(cls, value: str) -> str:
        known = find_language(value, "en-us")
        if known is None or known in NEEDS_PACKAGES:
            raise ValueError(f"no language {value!r}; there is {', '.join(_spoken())}")
        return known

    @field_validator("voices")
    @classmethod
    def _voices_are_blends(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            if parse_blend(name) is None:
                raise ValueError(f"{name!r} is neither a voice nor a blend")
        return value

    def resolve(self, name: str) -> str:
        """The voice or blend that a name stands for; most stand for themselves."""
        return self.voices.get(name) or OPENAI_VOICES.get(name) or name


@dataclass(frozen=True, slots=True)
class Utterance:
    """A request as the model's thread needs it."""

    sentences: tuple[str, ...]
    language: str
    """One of `LANGUAGES`' values."""
    blend: Blend
    voices: tuple[tuple[Path, float], ...]
    """The files of `blend`; empty while the model's files are not here."""
    speed: float
    seed: int
    word_times: bool


def parse_blend(text: str) -> Blend | None:
    """`a+b` or `a(2)+b(1)` as voices and weights above zero; None if it is not of that form."""
    parts = [_BLEND_PART.fullmatch(part.strip()) for part in text.split("+")]
    blend = tuple((part[1], float(part[2] or 1)) for part in parts if part is not None)
    good = len(blend) == len(parts) <= MAX_BLEND and all(weight > 0 for _, weight in blend)
    return blend if good else None


def find_language(asked: str, preferred: str) -> str | None:
    """Kokoro's language for an ISO 639-1 code with or without a region; None if it has none.

    `en` alone is `preferred` if that is English of either kind.
    """
    code = asked.lower().replace("_", "-")
    if code in LANGUAGES.values():
        return code
    primary = code.partition("-")[0]
    if preferred.partition("-")[0] == primary:
        return preferred
    return next((each for each in LANGUAGES.values() if each.partition("-")[0] == primary), None)


def _spoken() -> list[str]:
    return [each for each in LANGUAGES.values() if each not in NEEDS_PACKAGES]


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
            files = _voice_files(self._folder)
            utterance = replace(utterance, voices=_find_voices(utterance.blend, files))
        return KokoroRun(self.model, self._phonemizer, utterance, prepared.shape, emit)


class KokoroRuntime(TorchRuntime):
    """Loads Kokoro models."""

    name: ClassVar[str] = "kokoro"
    Options: ClassVar[type[Section]] = KokoroOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        super().__init__(device, cache_dir)
        self._phonemizer: Phonemizer | None = None
        self._folders: dict[str, Path] = {}

    def start(self) -> None:
        """Import torch, spaCy and kokoro, and read the lexicons (some seconds).

        The libraries' own libraries set variables, filters of warnings and the state of `random`
        as they are imported; all are put back. loguru, which only kokoro uses here, is left
        silent.
        """
        environment = dict(os.environ)
        with GATE.exclusive(), warnings.catch_warnings():
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
        asked = check_speech(model, request, default_seed=0)
        check_no_clone(model, asked)
        options: KokoroOptions = model.options
        voice = asked.voice or options.voice
        blend = parse_blend(options.resolve(voice))
        folder = self._present(model)
        files = None if folder is None else _voice_files(folder)
        if blend is None:
            raise _no_voice(voice, files)
        voices = () if files is None else _find_voices(blend, files)
        language = self._language(model, asked.language, blend)
        sentences = split_sentences(asked.text, language, max_chars=SENTENCE_CHARS)
        longest = max(map(len, sentences))
        # What a run takes grows with the seconds of its longest sentence.
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

    def _language(self, model: ModelConfig, asked: str | None, blend: Blend) -> str:
        default: str = _language_of(blend[0][0]) or model.options.language
        language = default if asked is None else find_language(asked, default)
        if language is None:
            raise InvalidRequest(
                f"The model {model.id!r} does not speak {asked!r}; it speaks"
                f" {', '.join(_spoken())}.",
                param="language",
            )
        if language in NEEDS_PACKAGES:
            raise InvalidRequest(
                f"Speaking {language!r} needs packages that are not part of this server"
                f" (misaki[{language}]).",
                param="language",
            )
        return language

    def _present(self, model: ModelConfig) -> Path | None:
        """The folder where the files are here already. Asked anew until they are."""
        if model.id not in self._folders:
            folder = present_folder(model.source, self._cache_dir, revision=model.options.revision)
            if folder is None:
                return None
            self._folders[model.id] = folder
        return self._folders[model.id]

    def _folder(self, model: ModelConfig) -> Path:
        return local_folder(
            model.source,
            self._cache_dir,
            revision=model.options.revision,
            patterns=FILES,
        )

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The files in `voices`, then the names that the configuration gives to them."""
        options: KokoroOptions = model.options
        folder = self._folder(model)
        files = _voice_files(folder)
        if not files:
            raise LoadFailed(f"{folder.name}: there is no voice in voices/")
        found = [
            Voice(name, name[3:].replace("_", " ").title() or name, _language_of(name))
            for name in files
        ]
        for alias, target in {**OPENAI_VOICES, **options.voices}.items():
            blend = parse_blend(target)
            if blend is not None and all(name in files for name, _ in blend):
                found.append(Voice(alias, target, _language_of(blend[0][0])))
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
        parkable = self.host is not None
        blocks = tuple(Block(part, nbytes, parkable) for part, nbytes in sizes.items())
        nbytes = sum(block.nbytes for block in blocks)
        # Building draws first weights for nothing, at some 100 MB/s; a measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=0.5 + nbytes / 1e8)

    def _build(self, model: ModelConfig) -> KokoroModel:
        from engine.runtimes.kokoro.model import VoiceModel

        assert self._phonemizer is not None
        folder = self._folder(model)
        weights = _weights(folder)
        with GATE.exclusive():
            made = VoiceModel(folder / "config.json", weights, self._device.kind)
        return KokoroModel(made, self._phonemizer, folder, model.id)

    async def stop(self) -> None:
        """End the loading thread and drop the lexicons."""
        await super().stop()
        self._phonemizer = None


def _weights(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise LoadFailed(f"{folder.name}: no config.json")
    found = sorted(folder.glob("*.pth"))
    if len(found) != 1:
        raise LoadFailed(f"{folder.name}: {len(found) or 'no'} .pth files, not one")
    return found[0]


def _voice_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((folder / "voices").glob("*.pt"))}


def _language_of(voice: str) -> str | None:
    return LANGUAGES.get(voice[:1]) if voice[2:3] == "_" else None


def _find_voices(blend: Blend, files: Mapping[str, Path]) -> tuple[tuple[Path, float], ...]:
    for name, _ in blend:
        if name not in files:
            raise _no_voice(name, files)
    return tuple((files[name], weight) for name, weight in blend)


def _no_voice(name: str, files: Mapping[str, Path] | None) -> InvalidRequest:
    some = sorted(files or ())[:8]
    known = f" There is {', '.join(some)}{', …' if len(files or ()) > 8 else ''}." if some else ""
    return InvalidRequest(f"There is no voice {name[:100]!r}.{known}", param="voice")
