"""G.711, the telephone's 8 bits a sample: µ-law in North America and Japan, A-law elsewhere.

A byte is a sign, three bits of a segment and four bits within it; the steps double with each
segment (ITU-T G.711, tables 1 and 2). Both laws become tables here. The encoder takes the nearest
of the 256 levels, with FFmpeg's thresholds between two of them, so both give the same bytes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from engine.events import Samples

RATE = 8000
"""Hertz."""

_ULAW_INVERTED, _ALAW_INVERTED = 0xFF, 0xD5
"""The bits that are inverted on the line: all of µ-law; of A-law the sign and every second one."""

_SIGN = 0x80

_STEPS = 1 << 14
"""FFmpeg's encoder looks at 14 of the 16 bits: the least step of µ-law is 8, of A-law 16."""


def decode_ulaw(data: bytes) -> Samples:
    """µ-law as samples at 8 kHz, one a byte."""
    return _decoded(data, _ulaw_levels())


def encode_ulaw(samples: Samples) -> bytes:
    """Samples at 8 kHz as µ-law, one byte each. What is beyond -1 and 1 is clipped."""
    return _encoded(samples, _ulaw_codes())


def decode_alaw(data: bytes) -> Samples:
    """A-law as samples at 8 kHz, one a byte."""
    return _decoded(data, _alaw_levels())


def encode_alaw(samples: Samples) -> bytes:
    """Samples at 8 kHz as A-law, one byte each. What is beyond -1 and 1 is clipped."""
    return _encoded(samples, _alaw_codes())


def to_int16(samples: Samples) -> NDArray[np.int16]:
    """Samples as integers of 16 bits: rounded, and clipped beyond -1 and 1."""
    rounded: Samples = np.rint(samples * np.float32(32768))
    return rounded.clip(-32768, 32767).astype(np.int16)


def _decoded(data: bytes, levels: NDArray[np.int16]) -> Samples:
    samples: Samples = levels[np.frombuffer(data, np.uint8)].astype(np.float32)
    return samples / np.float32(32768)


def _encoded(samples: Samples, codes: NDArray[np.uint8]) -> bytes:
    data: bytes = codes[(to_int16(samples) >> 2) + _STEPS // 2].tobytes()
    return data


@cache
def _ulaw_levels() -> NDArray[np.int16]:
    """The level of each byte, at 16 bits."""
    code = np.arange(256) ^ _ULAW_INVERTED
    segment, step = code >> 4 & 7, code & 15
    # Each segment would begin at a power of two, were it not for the bias of 33 (at 14 bits).
    level = ((2 * step + 33 << segment) - 33) * 4
    return np.where(code & _SIGN, -level, level).astype(np.int16)


@cache
def _alaw_levels() -> NDArray[np.int16]:
    """The level of each byte, at 16 bits."""
    code = np.arange(256) ^ _ALAW_INVERTED
    segment, step = code >> 4 & 7, code & 15
    # The lowest two segments have the same step.
    level = np.where(segment, 2 * step + 33 << np.maximum(segment - 1, 0), 2 * step + 1) * 8
    return np.where(code & _SIGN, -level, level).astype(np.int16)


@cache
def _ulaw_codes() -> NDArray[np.uint8]:
    return _codes(_ulaw_levels(), _ULAW_INVERTED)


@cache
def _alaw_codes() -> NDArray[np.uint8]:
    return _codes(_alaw_levels(), _ALAW_INVERTED)


def _codes(levels: NDArray[np.int16], inverted: int) -> NDArray[np.uint8]:
    """The byte of each level of 14 bits, from the most negative on."""
    rising = levels[np.arange(128) ^ inverted].astype(int)
    thresholds = (rising[:-1] + rising[1:] + 4) // 8  # the middle of two levels, at 14 bits
    values = np.arange(_STEPS) - _STEPS // 2
    code = np.searchsorted(thresholds, np.abs(values), side="right")
    return (np.where(values < 0, code | _SIGN, code) ^ inverted).astype(np.uint8)
