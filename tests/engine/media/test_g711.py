"""G.711 against FFmpeg's own, for every byte and every level of 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.events import Samples
from engine.media.g711 import decode_alaw, decode_ulaw, encode_alaw, encode_ulaw

Law = tuple[str, Callable[[bytes], Samples], Callable[[Samples], bytes]]

LAWS: list[Law] = [
    ("pcm_mulaw", decode_ulaw, encode_ulaw),
    ("pcm_alaw", decode_alaw, encode_alaw),
]

BYTES = bytes(range(256))
LEVELS = np.arange(-32768, 32768).astype(np.int16)


def ffmpeg_encoded(codec: str, levels: NDArray[np.int16]) -> bytes:
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.format, encoder.layout = 8000, "s16", "mono"
    frame = av.AudioFrame.from_ndarray(levels[np.newaxis], format="s16", layout="mono")
    frame.sample_rate = 8000
    return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


def ffmpeg_decoded(codec: str, data: bytes) -> NDArray[np.int16]:
    decoder = av.CodecContext.create(codec, "r")
    assert isinstance(decoder, av.AudioCodecContext)
    decoder.sample_rate, decoder.layout = 8000, "mono"
    frames = decoder.decode(av.Packet(data))
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law[0])
class TestLaw:
    def test_each_byte_is_the_level_that_ffmpeg_decodes(self, law: Law) -> None:
        codec, decode, _ = law
        found = decode(BYTES)
        assert found.dtype == np.float32 and np.abs(found).max() < 1
        np.testing.assert_array_equal(found * 32768, ffmpeg_decoded(codec, BYTES))

    def test_each_level_is_the_byte_that_ffmpeg_encodes(self, law: Law) -> None:
        codec, _, encode = law
        found = encode((LEVELS / 32768).astype(np.float32))
        assert found == ffmpeg_encoded(codec, LEVELS)

    def test_a_decoded_byte_is_encoded_to_itself(self, law: Law) -> None:
        codec, decode, encode = law
        # µ-law has a negative zero as well, which becomes the positive one.
        expected = BYTES.replace(b"\x7f", b"\xff") if codec == "pcm_mulaw" else BYTES
        assert encode(decode(BYTES)) == expected

    def test_what_is_too_loud_is_clipped(self, law: Law) -> None:
        _, _, encode = law
        loud = np.array([-9, -1, 1, 9], np.float32)
        assert encode(loud) == encode(np.array([-1, -1, 1, 1], np.float32))
        assert encode(loud)[0] != encode(loud)[3]

    def test_nothing_becomes_nothing(self, law: Law) -> None:
        _, decode, encode = law
        assert decode(b"").shape == (0,)
        assert encode(np.zeros(0, np.float32)) == b""
