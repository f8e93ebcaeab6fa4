"""The audio that a realtime session gets: read, kept while it is needed, and cut into turns."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InvalidRequest
from engine.media.pcm_stream import PcmReader, Resampler
from engine.media.turns import SemanticTurns, SpeechStarted, TurnDetector, TurnEvent
from engine.media.voice_activity import VoiceActivity
from server.schemas.realtime import InputAudio, SemanticVad, ServerVad

if TYPE_CHECKING:
    from engine.events import Samples

RATE = 16_000
"""Hertz. What the voice activity detector and Whisper both hear."""
MAX_S = 600
"""Seconds of audio that are kept."""
MAX_APPEND_BYTES = 15 * 2**20
"""OpenAI's limit for one append."""


class InputBuffer:
    """The audio since the last commit. With turn detection, what lies before speech is dropped."""

    def __init__(self, config: InputAudio) -> None:
        """Begin with no audio at all: 0 ms. `VoiceActivity.load` comes before turn detection."""
        self._config = config
        self._reader = PcmReader(config.format.codec)
        self._resampler = Resampler(self._reader.rate, RATE)
        self._kept = bytearray()
        self._begin = 0
        """The number of samples before the first that is kept."""
        self._speech_from: float | None = None
        """Milliseconds; None while nobody speaks."""
        self._activity: VoiceActivity | None = None
        self._turns: TurnDetector | SemanticTurns | None = None
        self._set_turns(config.turn_detection)

    @property
    def now_ms(self) -> float:
        """Milliseconds of audio so far."""
        return (self._begin + len(self._kept) // 2) * 1e3 / RATE

    @property
    def kept_ms(self) -> float:
        """Milliseconds of audio that a commit would take."""
        return len(self._kept) / 2 * 1e3 / RATE

    @property
    def speaking(self) -> bool:
        """Whether somebody speaks."""
        return self._speech_from is not None

    def configure(self, config: InputAudio) -> None:
        """Go on with other options. The audio so far stays.

        Raises:
            InvalidRequest: the format changes while there is audio.

        """
        if config.format != self._config.format:
            if self._kept:
                raise InvalidRequest(
                    "The format cannot change while the buffer holds audio.",
                    param="session.audio.input.format",
                )
            self._reader = PcmReader(config.format.codec)
            self._resampler = Resampler(self._reader.rate, RATE)
        if config.turn_detection != self._config.turn_detection:
            self._set_turns(config.turn_detection)
        self._config = config

    def _set_turns(self, detection: ServerVad | SemanticVad | None) -> None:
        self._speech_from = None
        self._activity = self._turns = None
        if detection is None:
            return
        self._activity = VoiceActivity()
        if isinstance(detection, ServerVad):
            self._turns = TurnDetector(
                detection.threshold,
                detection.prefix_padding_ms,
                detection.silence_duration_ms,
                detection.idle_timeout_ms,
                at_ms=int(self.now_ms),
            )
        else:
            self._turns = SemanticTurns(detection.eagerness, at_ms=int(self.now_ms))

    def append(self, data: bytes) -> Sequence[TurnEvent]:
        """Take audio, and say what it changed. Call it off the event loop.

        Raises:
            InvalidRequest: there is too much of it.

        """
        samples = self._resampler.feed(self._reader.read(data))
        if self.kept_ms + len(samples) * 1e3 / RATE > MAX_S * 1e3:
            raise InvalidRequest(
                f"The buffer holds {MAX_S} seconds of audio at most. Commit or clear it.",
                param="audio",
            )
        self._kept += _pcm16(samples)
        if self._activity is None or self._turns is None:
            return ()
        events = self._turns.feed(self._activity.feed(samples))
        for event in events:
            if isinstance(event, SpeechStarted):
                self._speech_from = event.at_ms
        if self._speech_from is None:
            self._drop_before(self.now_ms - 2_000)
        else:
            self._drop_before(self._speech_from)
        return events

    def _drop_before(self, at_ms: float) -> None:
        count = int(at_ms * RATE / 1e3) - self._begin
        if count > 0:
            del self._kept[: 2 * count]
            self._begin += count

    def heard(self, transcript: str, paused_at_ms: int) -> None:
        """Judge what was said up to a pause: a sentence that is whole ends its turn sooner."""
        if isinstance(self._turns, SemanticTurns):
            self._turns.heard(transcript, paused_at_ms)

    def wait_for_speech(self, after_ms: int) -> None:
        """Begin the idle timeout once `after_ms` more of audio have come."""
        if isinstance(self._turns, TurnDetector):
            self._turns.wait_for_speech(after_ms)

    def cancel_wait(self) -> None:
        """End the idle timeout."""
        if isinstance(self._turns, TurnDetector):
            self._turns.cancel_wait()

    def peek(self) -> bytes:
        """What a commit would take now, as a WAV file."""
        return _wav(bytes(self._kept))

    def commit(self) -> bytes:
        """Take the audio, as a WAV file."""
        data = bytes(self._kept)
        self.clear()
        return _wav(data)

    def clear(self) -> None:
        """Drop the audio."""
        self._begin += len(self._kept) // 2
        self._kept.clear()
        self._speech_from = None
        if self._turns is not None:
            self._turns.reset()


def _pcm16(samples: Samples) -> bytes:
    return (np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes()


def _wav(data: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(data)
    return file.getvalue()
