"""Speech encoded piece by piece, while a model makes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import RuntimeFailed
from engine.events import Speech, Word
from engine.media.audio_output import ENCODINGS, AudioEncoder, AudioFormat

if TYPE_CHECKING:
    from engine.session import Session


@dataclass(frozen=True, slots=True)
class EncodedSpeech:
    """The bytes that a piece of speech completes, maybe none."""

    data: bytes
    words: tuple[Word, ...]
    """Of the piece."""
    sample_rate: int
    """Hertz of the encoded audio."""


async def encoded_speech(
    audio_format: AudioFormat, session: Session
) -> AsyncGenerator[EncodedSpeech, None]:
    """All that the session speaks, as one file or stream.

    Raises:
        RuntimeFailed: it spoke nothing.
        EngineError: what the session raises.

    """
    encoder = None
    rate = ENCODINGS[audio_format].sample_rate or 0
    async with aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, Speech):
                if encoder is None:
                    encoder = AudioEncoder(audio_format, event.sample_rate)
                    rate = rate or event.sample_rate
                data = await asyncio.to_thread(encoder.encode, event.samples)
                yield EncodedSpeech(data, event.words, rate)
    if encoder is None:
        raise RuntimeFailed("The model gave no speech.")
    # The session ended with its events: the device is free while the rest is encoded.
    yield EncodedSpeech(await asyncio.to_thread(encoder.finish), (), rate)
