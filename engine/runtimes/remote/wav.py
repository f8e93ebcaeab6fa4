"""Samples out of a WAV file or bare PCM while it arrives."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from engine.events import Samples

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
"""Codes of formats (Microsoft, "WAVE and AVI Codec Registries", RFC 2361)."""

MOST_HEADER_BYTES = 2**16

MOST_RATE = 192_000


class NotWav(Exception):
    """The bytes are no WAV file that can be read here."""


class SampleReader:
    """Makes mono samples of bytes."""

    def __init__(self, pcm_rate: int | None) -> None:
        """`pcm_rate` is that of bare PCM with 16 bits; None: a WAV file says its own."""
        self.rate = pcm_rate
        self._held = b""
        self._channels = 1
        self._dtype = "<i2"
        self._rate = 0
        self._left: int | None = None
        """Bytes of samples to come; None: to the end of the stream."""

    @property
    def lacks(self) -> bool:
        """Whether the header promised more samples than have come."""
        return bool(self._left)

    def feed(self, chunk: bytes) -> Samples:
        """The samples that these bytes complete, maybe none.

        Raises:
            NotWav: it is another format.

        """
        data = self._held + chunk
        if self.rate is None:
            data = self._read_header(data)
        if self.rate is None:
            self._held = data
            return np.zeros(0, np.float32)
        if self._left is not None:
            data = data[: self._left]
        size = np.dtype(self._dtype).itemsize * self._channels
        whole = len(data) - len(data) % size
        self._held = data[whole:]
        if self._left is not None:
            self._left -= whole
            if not self._left:
                self._held = b""
        return self._samples(data[:whole])

    def _samples(self, data: bytes) -> Samples:
        found: NDArray[np.float32] = np.frombuffer(data, self._dtype).astype(np.float32)
        if self._dtype == "<i2":
            found /= 32768.0
        elif self._dtype == "<i4":
            found /= 2147483648.0
        if self._channels > 1:
            found = found.reshape(-1, self._channels).mean(axis=1)
        return found

    def _read_header(self, data: bytes) -> bytes:
        """Read the chunks before the samples; returns the bytes behind them, or all that it got."""
        if len(data) < 12:
            return data
        if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
            raise NotWav
        place, described = 12, False
        while len(data) >= place + 8:
            name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
            body = place + 8
            if name == b"data":
                if not described:
                    raise NotWav
                self.rate = self._rate
                # A stream that cannot know its length says 0 or the largest number.
                self._left = None if size in (0, 0xFFFFFFFF) or size > 2**31 else size
                return data[body:]
            if len(data) < body + size + size % 2:
                break
            if name == b"fmt ":
                self._describe(data[body : body + size])
                described = True
            place = body + size + size % 2
        if len(data) > MOST_HEADER_BYTES:
            raise NotWav
        return data

    def _describe(self, body: bytes) -> None:
        if len(body) < 16:
            raise NotWav
        code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
        if code == EXTENSIBLE and len(body) >= 26:
            code = struct.unpack_from("<H", body, 24)[0]
        kinds = {(PCM, 16): "<i2", (PCM, 32): "<i4", (FLOAT, 32): "<f4"}
        if (code, bits) not in kinds or not 1 <= channels <= 8 or not 1 <= rate <= MOST_RATE:
            raise NotWav
        self._dtype, self._channels, self._rate = kinds[code, bits], channels, rate
