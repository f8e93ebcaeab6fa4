"""What a transcript with speakers takes: a model that tells them apart, and known voices."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidRequest
from engine.media.audio_input import decode_audio
from engine.requests import KnownSpeaker
from engine.spoken_transcript import DIARIZE
from server.keys.access import Access

RATE = 16_000
"""Hertz of a known voice, as `KnownSpeaker` has it."""

LEAST_S, MOST_S = 2.0, 10.0
"""The length of a known voice: OpenAI's bounds."""

SILENT = 1e-3
"""A recording whose samples are all below has no voice: 60 dB under the loudest."""


def find_diarizer(config: EngineConfig, access: Access) -> ModelConfig:
    """The first model of the configuration that tells speakers apart and that the key may use.

    Raises:
        InvalidRequest: there is none.

    """
    for model in config.models:
        if model.task == DIARIZE and access.may_use(model.id):
            return model
    raise InvalidRequest(
        "diarized_json takes a model that tells speakers apart. The configuration has none with"
        f" the task {DIARIZE} that this request may use.",
        param="response_format",
    )


def known_speakers(names: Sequence[str], references: Sequence[bytes]) -> tuple[KnownSpeaker, ...]:
    """The speakers that a request knows, their recordings decoded. Not for the event loop.

    Raises:
        InvalidRequest: naming the reference that is no recording of the right length.

    """
    found = []
    for index, (name, data) in enumerate(zip(names, references, strict=True)):
        param = f"known_speaker_references[{index}]"
        samples = decode_audio(data, rate=RATE, max_seconds=MOST_S, param=param)
        if len(samples) < LEAST_S * RATE:
            raise InvalidRequest(
                f"A reference has {LEAST_S:g} to {MOST_S:g} seconds; this one has"
                f" {len(samples) / RATE:.1f}.",
                param=param,
            )
        if float(abs(samples).max()) < SILENT:
            raise InvalidRequest("A reference has a voice; this one is silent.", param=param)
        found.append(KnownSpeaker(name, samples))
    return tuple(found)
