"""Audio without a container, piece by piece: what a realtime client sends and hears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import av
import numpy as np

from engine.events import Samples
from engine.media.g711 import RATE as G711_RATE
from engine.media.g711 import (
    decode_alaw,
    decode_ulaw,
    encode_alaw,
    encode_ulaw,
    to_int16,
)

PcmFormat: TypeAlias = Literal["pcm", "pcmu", "pcma"]
"""OpenAI's names, without `audio/`: 16 bits at 24 kHz, G.711 µ-law, G.711 A-law."""

PCM_RATE = 24_000
"""Hertz, the only rate of OpenAI's realtime `audio/pcm`."""


@dataclass(frozen=True, slots=True)
class _Code:
    rate: int
    sample_bytes: int
    decode: Callable[[bytes], Samples]
    encode: Callable[[Samples], bytes]


def _decode_pcm(data: bytes) -> Samples:
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)


def _encode_pcm(samples: Samples) -> bytes:
    return to_int16(samples).astype("<i2").tobytes()


_CODES: Mapping[PcmFormat, _Code] = MappingProxyType(
    {
        "pcm": _Code(PCM_RATE, 2, _decode_pcm, _encode_pcm),
        "pcmu": _Code(G711_RATE, 1, decode_ulaw, encode_ulaw),
        "pcma": _Code(G711_RATE, 1, decode_alaw, encode_alaw),
    }
)


class PcmReader:
    """Decodes a stream that may be cut anywhere, also within a sample."""

    def __init__(self, format: PcmFormat) -> None:
        self._code = _CODES[format]
        self._rest = b""

    @property
    def rate(self) -> int:
        """Hertz."""
        return self._code.rate

    def read(self, data: bytes) -> Samples:
        """The samples that are whole by now. Half a sample waits for the next call."""
        data = self._rest + data
        whole = len(data) - len(data) % self._code.sample_bytes
        self._rest = data[whole:]
        return self._code.decode(data[:whole])


class Resampler:
    """Changes the rate of a stream as if it were one piece.

    FFmpeg's filter looks ahead, so that up to a millisecond or two stays inside until more samples
    come. One thread at a time may use it.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        """Both rates are in hertz.

        Raises:
            ValueError: one of them is below 1.

        """
        if min(from_rate, to_rate) < 1:
            raise ValueError(f"a sample rate is 1 or more, not {from_rate} and {to_rate}")
        self._from_rate = from_rate
        self._resampler = (
            None
            if from_rate == to_rate
            else av.AudioResampler(format="flt", layout="mono", rate=to_rate)
        )
        self._began = False

    def feed(self, samples: Samples) -> Samples:
        """The samples that are ready after these.

        Raises:
            ValueError: not one row of float32.

        """
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise ValueError(f"expected float32 (samples,), got {samples.dtype} {samples.shape}")
        if self._resampler is None or not len(samples):
            return samples
        row = np.ascontiguousarray(samples)[np.newaxis]
        frame = av.AudioFrame.from_ndarray(row, format="flt", layout="mono")
        frame.sample_rate = self._from_rate
        frame.pts = None  # without times the resampler counts itself
        self._began = True
        return self._resampled(self._resampler, frame)

    def finish(self) -> Samples:
        """The remaining samples. Nothing can be fed afterwards."""
        if self._resampler is None or not self._began:
            return np.zeros(0, np.float32)
        return self._resampled(self._resampler, None)

    def _resampled(self, resampler: av.AudioResampler, frame: av.AudioFrame | None) -> Samples:
        pieces = [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
        return np.concatenate([np.zeros(0, np.float32), *pieces])


class PcmWriter:
    """Encodes a stream of samples for a client. One thread at a time may use it."""

    def __init__(self, format: PcmFormat, from_rate: int) -> None:
        """`from_rate` in hertz is the rate of the samples that come in.

        Raises:
            ValueError: the rate is below 1.

        """
        self._code = _CODES[format]
        self._resampler = Resampler(from_rate, self._code.rate)

    @property
    def rate(self) -> int:
        """Hertz of what comes out."""
        return self._code.rate

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return self._code.sample_bytes

    def write(self, samples: Samples) -> bytes:
        """The bytes that are ready after these samples, which are clipped beyond -1 and 1.

        Raises:
            ValueError: not one row of float32.

        """
        return self._code.encode(self._resampler.feed(samples))

    def finish(self) -> bytes:
        """The remaining bytes. Nothing can be written afterwards."""
        return self._code.encode(self._resampler.finish())
