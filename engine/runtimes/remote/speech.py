"""Speech from a provider, passed on while it arrives."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Event, Speech
from engine.requests import SpeechRequest
from engine.runtimes.remote.failures import garbage
from engine.runtimes.remote.fields import extra_fields
from engine.runtimes.remote.options import RemoteOptions
from engine.runtimes.remote.provider import Answer, Call, Provider
from engine.runtimes.remote.reply import Reply
from engine.runtimes.remote.target import Target
from engine.usage import Usage

PATH = "/audio/speech"


@dataclass(frozen=True, slots=True)
class SpeechCall:
    """A speech request for a provider."""

    fields: Mapping[str, Any]


def prepare_speech(
    model: ModelConfig, request: SpeechRequest, options: RemoteOptions
) -> SpeechCall:
    """The fields for the provider.

    Raises:
        InvalidRequest: naming a field that the provider does not take.

    """
    if request.voice_sample is not None:
        raise InvalidRequest(
            f"voice: the model {model.id!r} does not take cloned voices.", param="voice"
        )
    fields: dict[str, Any] = {
        "model": options.model,
        "input": request.text,
        "response_format": options.audio_format,
    }
    voice = request.voice or options.voice
    if voice is not None:
        fields["voice"] = options.voices.get(voice, voice)
    if request.speed != 1.0:
        fields["speed"] = request.speed
    fields |= extra_fields(model.id, options, {"language": request.language, "seed": request.seed})
    return SpeechCall(fields)


async def run_speech(
    provider: Provider, target: Target, request: SpeechRequest, call: SpeechCall, usage: Usage
) -> AsyncGenerator[Event, None]:
    """The pieces of audio.

    Raises:
        EngineError: see `Provider.answer`. Audio that breaks off raises `ProviderFailed`.

    """
    # They bring NumPy, which commands that read a configuration need not wait for.
    import numpy as np

    from engine.events import Samples
    from engine.runtimes.remote.wav import NotWav, SampleReader

    options = target.options
    bare = options.audio_format == "pcm"

    def read(reader: SampleReader, chunk: bytes) -> Samples:
        try:
            return reader.feed(chunk)
        except NotWav:
            raise garbage(provider.name, "audio that is no WAV file of 16 bits") from None

    async def first_samples(reply: Reply) -> tuple[SampleReader, Samples]:
        if reply.media_type in ("application/json", "text/html"):
            raise garbage(provider.name, f"{reply.media_type} in the place of audio")
        reader = SampleReader(options.sample_rate if bare else None)
        while (chunk := await reply.next()) is not None:
            samples = read(reader, chunk)
            if len(samples):
                return reader, samples
        raise garbage(provider.name, "no audio")

    sent = Call(
        target=target,
        path=PATH,
        kind=request.operation.value,
        request_id=request.request_id,
        streams=True,
        json=json.dumps(call.fields).encode(),
    )
    usage.characters = len(request.text)
    answer: Answer[tuple[SampleReader, Samples]]
    async with await provider.answer(sent, first_samples) as answer:
        reader, samples = answer.first
        assert reader.rate is not None
        yield Speech(np.clip(samples, -1.0, 1.0), reader.rate)
        while (chunk := await answer.next()) is not None:
            samples = read(reader, chunk)
            if len(samples):
                yield Speech(np.clip(samples, -1.0, 1.0), reader.rate)
        if reader.lacks:
            raise garbage(provider.name, "audio that ends in the middle")
