"""Shared by the runtimes of speech models: options, checks, and the model on its thread.

Nothing here imports a library. The run itself is in `speech_run`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest
from engine.requests import Request, SpeechRequest
from engine.runtimes.base import Prepared
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel

if TYPE_CHECKING:
    from engine.runtimes.common.speech_run import Speaker

MIN_SPEED, MAX_SPEED = 0.25, 4.0
"""OpenAI's range."""

MAX_SEED = 2**32 - 1

NOTHING_TO_SPEAK = "There is nothing to speak in the text."

CHARACTERS_PER_S = 12
"""Rate of speech: some 150 words a minute, of five letters and a space each, rounded down."""

VOCODER_BYTES = 384
"""Working memory of one sample: three tensors of 32 channels in float32. That is the width of
HiFi-GAN's last stage (https://arxiv.org/abs/2010.05646, V1)."""


class SpeechOptions(Section):
    """Options of a speech model."""

    voice: str | None = None
    """The voice of requests that name none. By default the model's first."""
    voices: dict[str, str] = Field(default_factory=dict)
    """Further names for the model's voices, such as OpenAI's `alloy`."""
    language: str | None = None
    """The language of requests that name none, ISO 639-1. By default the model's first."""
    max_chars: int = Field(default=4096, ge=1, le=10_000_000)
    """Limit for one request. 4096 is OpenAI's."""
    sentence_chars: int = Field(default=200, ge=20, le=1000)
    """A sentence longer than this is spoken in pieces."""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Utterance:
    """The text to speak, in the model's own terms."""

    sentences: tuple[str, ...]
    voice: str | None
    """The model's name of the voice. None for a model with one voice, and for a cloned voice."""
    language: str | None
    """The model's name of the language."""
    seed: int


def check_speech(
    model: ModelConfig, request: Request, *, default_seed: int | None = None
) -> SpeechRequest:
    """Refuse requests that no speech model can serve; fill in the seed.

    A request without a seed gets `default_seed`, or a random one if that is None. The model's
    options must have `max_chars`.

    Raises:
        InvalidRequest: naming `model`, `input`, `speed` or `seed`.

    """
    if not isinstance(request, SpeechRequest) or model.task != "speech":
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )
    if not any(character.isalnum() for character in request.text):
        raise InvalidRequest(NOTHING_TO_SPEAK, param="input")
    max_chars: int = model.options.max_chars
    if len(request.text) > max_chars:
        raise InvalidRequest(
            f"The text must be at most {max_chars} characters long, not {len(request.text)}.",
            param="input",
        )
    if not MIN_SPEED <= request.speed <= MAX_SPEED:
        raise InvalidRequest(f"speed must be from {MIN_SPEED} to {MAX_SPEED:g}.", param="speed")
    seed = default_seed if request.seed is None else request.seed
    if seed is None:
        seed = random.randrange(MAX_SEED)
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"seed must be from 0 to {MAX_SEED}.", param="seed")
    return replace(request, seed=seed)


def check_no_clone(model: ModelConfig, request: SpeechRequest) -> None:
    """Refuse a cloned voice, for a model that has only its own.

    Raises:
        InvalidRequest: naming `voice`.

    """
    if request.voice_sample is not None:
        raise InvalidRequest(f"The model {model.id!r} cannot clone a voice.", param="voice")


def choose_voice(model: ModelConfig, request: SpeechRequest, known: Sequence[str]) -> str:
    """The model's name of the voice that the request asks for. `known` must not be empty.

    Raises:
        InvalidRequest: the model has no such voice.

    """
    options: SpeechOptions = model.options
    asked = request.voice or options.voice or known[0]
    voice = options.voices.get(asked, asked)
    if voice not in known:
        there = ", ".join([*known[:20], *(["…"] if len(known) > 20 else [])])
        raise InvalidRequest(
            f"The model {model.id!r} has no voice {asked!r}; there is {there}.", param="voice"
        )
    return voice


def choose_language(model: ModelConfig, request: SpeechRequest, known: Sequence[str]) -> str | None:
    """The model's name of the language. It may have a region that the request left out.

    None if the model does not declare its languages and neither request nor options name one.

    Raises:
        InvalidRequest: the model does not speak it.

    """
    options: SpeechOptions = model.options
    asked = request.language or options.language
    if asked is None:
        return known[0] if known else None
    by_primary: Mapping[str, str] = {primary_language(each): each for each in reversed(known)}
    exact = {each.lower(): each for each in known}
    found = exact.get(asked.lower()) or by_primary.get(primary_language(asked))
    if found is not None:
        return found
    if not known and options.language and primary_language(asked) == options.language:
        return options.language
    there = ", ".join(known) or options.language or "only its own"
    raise InvalidRequest(
        f"The model {model.id!r} does not speak {asked!r}; there is {there}.", param="language"
    )


def primary_language(tag: str) -> str:
    """`en` of `en`, `en-GB` and `en_gb`."""
    return tag.replace("_", "-").partition("-")[0].lower()


def prepared_speech(
    request: SpeechRequest, utterance: Utterance | None, sample_rate: int
) -> Prepared:
    """The request with an estimate of its working memory, whose peak is the vocoder's last stage.

    Without the model's files there is no utterance yet. It is then made when the run begins.
    """
    if utterance is None:
        return Prepared(request, None)
    longest = -(-max(map(len, utterance.sentences)) // 50) * 50
    seconds = longest / CHARACTERS_PER_S / min(1.0, request.speed)
    return Prepared(
        replace(request, voice=utterance.voice or request.voice, language=utterance.language),
        utterance,
        working_bytes=int(seconds * sample_rate * VOCODER_BYTES),
        shape=f"speech-{longest}-{request.speed:g}",
    )


class SpeechModel(TorchModel["Speaker"]):
    """One speech model on its own thread."""

    def __init__(
        self, speaker: Speaker, model_id: str, understand: Callable[[SpeechRequest], Utterance]
    ) -> None:
        """`understand` makes the utterance of a request that was prepared without the files."""
        super().__init__(speaker, model_id)
        self._understand = understand

    def make_run(self, prepared: Prepared, emit: Emit) -> ThreadRun:
        """Speak."""
        from engine.runtimes.common.speech_run import SpeechRun

        request = prepared.request
        assert self.model is not None and isinstance(request, SpeechRequest)
        utterance: Utterance = prepared.payload or self._understand(request)
        return SpeechRun(self.model, request, utterance, prepared.shape, emit)
