"""A recording to transcribe: made here, so that nothing has to be fetched."""

from __future__ import annotations

import io
import wave

import numpy as np

RATE = 16_000
"""Hertz; what transcription models take."""
TONE_HZ = 220.0
LOUDNESS = 8000.0


def tone(seconds: int) -> bytes:
    """A tone that comes and goes every second, as a WAV file of 16 bits."""
    times_s = np.arange(seconds * RATE) / RATE
    sounding = np.sin(2 * np.pi * times_s) > 0
    samples = LOUDNESS * np.sin(2 * np.pi * TONE_HZ * times_s) * sounding
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()
