"""Streams in pieces of any size give what the whole gives."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import numpy as np
import pytest

from engine.events import Samples
from engine.media.g711 import decode_alaw, decode_ulaw, encode_alaw, encode_ulaw
from engine.media.pcm_stream import PcmFormat, PcmReader, PcmWriter, Resampler

RATES = [(24_000, 16_000), (8_000, 16_000), (22_050, 24_000), (24_000, 8_000), (24_000, 24_000)]
FORMATS: list[PcmFormat] = ["pcm", "pcmu", "pcma"]


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> Samples:
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def cut(samples: Samples) -> list[Samples]:
    """Pieces of 0 to some 900 samples, as frames of a network come."""
    random = np.random.default_rng(3)
    ends = [0, *np.cumsum(random.integers(0, 900, len(samples))).tolist()]
    return [samples[begin:end] for begin, end in pairwise(ends) if begin < len(samples)]


def resampled(from_rate: int, to_rate: int, pieces: list[Samples]) -> Samples:
    resampler = Resampler(from_rate, to_rate)
    return np.concatenate([*map(resampler.feed, pieces), resampler.finish()])


class TestReader:
    def test_bytes_are_little_endian_integers(self) -> None:
        reader = PcmReader("pcm")
        assert reader.rate == 24_000
        assert reader.read(b"\x00\x40\x00\x80\xff\xff").tolist() == [0.5, -1.0, -1 / 32768]

    def test_an_odd_byte_waits_for_its_other_half(self) -> None:
        data = np.random.default_rng(0).bytes(2000)
        reader = PcmReader("pcm")
        whole = PcmReader("pcm").read(data)
        parts = [reader.read(data[start : start + 7]) for start in range(0, len(data), 7)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert reader.read(b"\x00").shape == reader.read(b"").shape == (0,)

    def test_g711_is_decoded_by_its_law(self) -> None:
        data = bytes(range(256))
        ulaw, alaw = PcmReader("pcmu"), PcmReader("pcma")
        assert ulaw.rate == alaw.rate == 8_000
        np.testing.assert_array_equal(ulaw.read(data), decode_ulaw(data))
        np.testing.assert_array_equal(alaw.read(data), decode_alaw(data))


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
class TestResampler:
    def test_pieces_give_what_the_whole_gives(self, from_rate: int, to_rate: int) -> None:
        samples = tone(from_rate)
        whole = resampled(from_rate, to_rate, [samples])
        pieces = cut(samples)
        assert len(pieces) > 15 and min(map(len, pieces)) < 100
        np.testing.assert_allclose(resampled(from_rate, to_rate, pieces), whole, atol=1e-6)

    def test_a_tone_stays_the_tone_without_clicks(self, from_rate: int, to_rate: int) -> None:
        found = resampled(from_rate, to_rate, cut(tone(from_rate)))
        assert len(found) == pytest.approx(to_rate, abs=1)
        # The filter's run-in and run-out at both ends of the stream are left out.
        inner = slice(to_rate // 50, to_rate - to_rate // 50)
        assert np.abs(found[inner] - tone(to_rate, 1.1)[: len(found)][inner]).max() < 0.005

    def test_hardly_anything_stays_inside(self, from_rate: int, to_rate: int) -> None:
        ready = Resampler(from_rate, to_rate).feed(tone(from_rate, 0.1))
        assert len(ready) / to_rate > 0.095


def test_a_resampler_takes_one_row_of_float32() -> None:
    for wrong in (np.zeros((1, 9), np.float32), np.zeros(9)):
        with pytest.raises(ValueError, match="expected float32"):
            Resampler(8_000, 16_000).feed(cast("Samples", wrong))
    with pytest.raises(ValueError, match="1 or more"):
        Resampler(0, 16_000)
    assert Resampler(8_000, 16_000).finish().shape == (0,)


class TestWriter:
    @pytest.mark.parametrize("pcm_format", FORMATS)
    def test_what_is_written_is_read_again(self, pcm_format: PcmFormat) -> None:
        writer, reader = PcmWriter(pcm_format, 22_050), PcmReader(pcm_format)
        data = b"".join([*map(writer.write, cut(tone(22_050))), writer.finish()])
        assert writer.rate == reader.rate
        assert len(data) == pytest.approx(writer.rate * writer.sample_bytes, abs=2)
        found = reader.read(data)
        inner = slice(reader.rate // 50, reader.rate - reader.rate // 50)
        error = np.abs(found[inner] - tone(reader.rate, 1.1)[: len(found)][inner]).max()
        assert error < (0.005 if pcm_format == "pcm" else 0.02)

    def test_samples_of_the_right_rate_keep_every_bit(self) -> None:
        data = np.random.default_rng(0).bytes(2000)
        assert PcmWriter("pcm", 24_000).write(PcmReader("pcm").read(data)) == data

    def test_g711_is_encoded_by_its_law(self) -> None:
        samples = tone(8_000)
        assert PcmWriter("pcmu", 8_000).write(samples) == encode_ulaw(samples)
        assert PcmWriter("pcma", 8_000).write(samples) == encode_alaw(samples)

    def test_what_is_too_loud_is_clipped(self) -> None:
        data = PcmWriter("pcm", 24_000).write(np.array([3, -3], np.float32))
        assert data == b"\xff\x7f\x00\x80"
