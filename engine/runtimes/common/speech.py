"""Shared by the runtimes of speech models: checks, and the model on its thread.

Nothing here imports a library. The run itself is in `speech_run`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.media.scripts import find_foreign
from engine.media.sentences import split_sentences
from engine.requests import Request, SpeechRequest
from engine.runtimes.base import Prepared
from engine.runtimes.common.speech_options import SpeechOptions
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel
from engine.runtimes.common.utterance import Utterance

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


def check_speech(
    model: ModelConfig, max_chars: int, request: Request, *, default_seed: int | None = None
) -> SpeechRequest:
    """Refuse requests that no speech model can serve; fill in the seed.

    A request without a seed gets `default_seed`, or a random one if that is None.

    Raises:
        InvalidRequest: naming `model`, `input`, `speed` or `seed`.

    """
    if not isinstance(request, SpeechRequest) or model.task != "speech":
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )
    if not any(character.isalnum() for character in request.text):
        raise InvalidRequest(NOTHING_TO_SPEAK, param="input")
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


def check_no_clone(model_id: str, request: SpeechRequest) -> None:
    """Refuse a cloned voice, for a model that has only its own.

    Raises:
        InvalidRequest: naming `voice`.

    """
    if request.voice_sample is not None:
        raise InvalidRequest(f"The model {model_id!r} cannot clone a voice.", param="voice")


def check_own_speed(model_id: str, request: SpeechRequest) -> None:
    """Refuse a speed, for a model that speaks at its own only.

    Raises:
        InvalidRequest: naming `speed`.

    """
    if request.speed != 1.0:
        raise InvalidRequest(f"The model {model_id!r} speaks at its own speed only.", param="speed")


def choose_voice(
    model_id: str, options: SpeechOptions, request: SpeechRequest, known: Sequence[str]
) -> str:
    """The model's name of the voice that the request asks for. `known` must not be empty.

    Raises:
        InvalidRequest: the model has no such voice.

    """
    asked = request.voice or options.voice or known[0]
    voice = options.voices.get(asked, asked)
    if voice not in known:
        there = ", ".join([*known[:20], *(["…"] if len(known) > 20 else [])])
        raise InvalidRequest(
            f"The model {model_id!r} has no voice {asked!r}; there is {there}.", param="voice"
        )
    return voice


def choose_or_clone(
    model_id: str, options: SpeechOptions, request: SpeechRequest, known: Sequence[str]
) -> str | None:
    """The model's name of the voice, for a model that can clone. None: the request's recording.

    Raises:
        InvalidRequest: the model has no such voice, or the recording is gone.

    """
    if request.voice_sample is not None:
        if not request.voice_sample.is_file():
            raise InvalidRequest("There is no recording of this voice.", param="voice")
        return None
    if not known:
        raise InvalidRequest(
            f"The model {model_id!r} has no voices of its own; give a cloned one.",
            param="voice",
        )
    return choose_voice(model_id, options, request, known)


def choose_language(
    model_id: str, options: SpeechOptions, request: SpeechRequest, known: Sequence[str]
) -> str | None:
    """The model's name of the language. It may have a region that the request left out.

    None if the model does not declare its languages and neither request nor options name one.

    Raises:
        InvalidRequest: the model does not speak it.

    """
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
        f"The model {model_id!r} does not speak {asked!r}; there is {there}.", param="language"
    )


def check_scripts(model_id: str, text: str, languages: Sequence[str], spoken: str = "") -> None:
    """Refuse letters of a script that none of the languages uses.

    `spoken` is what the model speaks, in words; by default the languages.

    Raises:
        InvalidRequest: naming `input`.

    """
    foreign = find_foreign(text, [primary_language(each) for each in languages])
    if foreign is not None:
        raise InvalidRequest(
            f"The model {model_id!r} would speak this as {spoken or ', '.join(languages)}, and"
            f" cannot speak {foreign.text[:20]!r}.",
            param="input",
        )


def cannot_speak(words: str) -> InvalidRequest:
    """The error for a text with words that a model has no characters for."""
    return InvalidRequest(
        f"The model has no characters for {words[:40]!r}, so it cannot speak this text.",
        param="input",
    )


def pieces_that_fit(text: str, language: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """The text, or pieces of it if the model cannot speak it at once, as numbers in words may."""
    if len(text) < 2 or fits(text):
        yield text
        return
    for piece in split_sentences(text, language, max_chars=-(-len(text) // 2)):
        yield from pieces_that_fit(piece, language, fits)


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
