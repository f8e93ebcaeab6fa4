"""Recordings made up on the spot: a voice that a voice activity detector takes for one."""

from __future__ import annotations

import io

import av
import numpy as np
from numpy.typing import NDArray

RATE = 16_000

FILES = {
    "wav": ("wav", "pcm_s16le"),
    "mp3": ("mp3", "libmp3lame"),
    "ogg": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "webm": ("webm", "libopus"),
    "flac": ("flac", "flac"),
}
"""Container and codec of each kind of file."""

VOWELS = np.array(
    [(700, 1200, 2600), (300, 2300, 3000), (500, 900, 2400), (400, 1900, 2500), (650, 1700, 2450)]
)
"""The first three formants, in hertz."""


def voice(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Syllables of a fifth of a second: pulses of a gliding pitch through three formants."""
    random = np.random.default_rng(seed)
    count = int(seconds * RATE)
    time = np.arange(count) / RATE
    pitch = 120 + 25 * np.sin(4.4 * time + seed) + 8 * np.sin(31 * time)
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0.0)
    source = pulses + 0.005 * random.standard_normal(count)
    out = np.zeros(count)
    for start in range(0, count, RATE // 5):
        part = source[start : start + RATE // 5]
        frequencies = np.fft.rfftfreq(len(part), 1 / RATE)
        formants = VOWELS[random.integers(len(VOWELS))]
        gain = sum(
            loudness / (1 + ((frequencies - formant) / (60 + 0.06 * formant)) ** 2)
            for formant, loudness in zip(formants, (1, 0.6, 0.3), strict=True)
        )
        shaped = np.fft.irfft(np.fft.rfft(part) * gain, len(part))
        out[start : start + len(part)] = shaped * np.sqrt(np.hanning(len(part)))
    samples: NDArray[np.float32] = (0.5 * out / np.abs(out).max()).astype(np.float32)
    return samples


def silence(seconds: float) -> NDArray[np.float32]:
    """With the faint noise that every recording has."""
    noise = np.random.default_rng(1).standard_normal(int(seconds * RATE))
    return (0.0005 * noise).astype(np.float32)


def encode(samples: NDArray[np.float32], kind: str = "wav", *, layout: str = "mono") -> bytes:
    """A file of one of `FILES`."""
    container_name, codec = FILES[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        channels = 2 if layout == "stereo" else 1
        pcm = np.repeat((samples * 32767).astype(np.int16), channels)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
