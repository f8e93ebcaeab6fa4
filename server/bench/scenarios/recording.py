"""A recording to transcribe. It is made here, so nothing has to be downloaded."""

from __future__ import annotations

import io
import wave
from array import array
from math import pi, sin

RATE = 16_000
"""Hertz, as transcription models expect."""
TONE_HZ = 220.0
LOUDNESS = 8000.0


def tone(seconds: int) -> bytes:
    """A tone that comes and goes every second, as a WAV file of 16 bits."""
    samples = array("h", bytes(2 * seconds * RATE))
    for number in range(len(samples)):
        angle = 2 * pi * number / RATE
        if sin(angle) > 0:
            samples[number] = int(LOUDNESS * sin(TONE_HZ * angle))
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples.tobytes())
    return file.getvalue()
