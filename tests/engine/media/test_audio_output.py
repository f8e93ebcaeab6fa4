"""Encoding: what comes out decodes to what went in, and comes out while it goes in."""

from __future__ import annotations

import io
import struct
import wave
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.media.audio_output import ENCODINGS, AudioEncoder, AudioFormat

if TYPE_CHECKING:
    from engine.events import Samples

FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
EXACT: tuple[AudioFormat, ...] = ("opus", "flac", "wav", "pcm")
Heard: TypeAlias = NDArray[np.int16] | NDArray[np.floating[Any]]
RATES = (16_000, 22_050, 24_000, 44_100, 48_000)


def voice_like(count: int, sample_rate: int, pitch_hz: float = 150.0) -> Samples:
    """Harmonics that swell three times a second: nothing in it repeats within 50 ms."""
    t = np.arange(count) / sample_rate
    sweep = 2 * np.pi * (pitch_hz * t + 40 * t**2)
    tone = sum((np.sin(k * sweep) / k for k in range(1, 5)), np.zeros(count))
    return (0.3 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def quantised(samples: Samples) -> NDArray[np.int16]:
    """16 bits, by the scale that every decoder undoes."""
    quantised: NDArray[np.int16] = np.rint(samples * 32768.0).clip(-32768, 32767).astype(np.int16)
    return quantised


def decoded(encoded: bytes, audio_format: AudioFormat) -> tuple[Heard, int]:
    """Mono samples, and hertz."""
    if audio_format == "pcm":
        return np.frombuffer(encoded, "<i2"), 24_000
    with av.open(io.BytesIO(encoded)) as container:
        (stream,) = container.streams.audio
        assert stream.channels == 1
        frames = [frame.to_ndarray()[0] for frame in container.decode(stream)]
        return np.concatenate(frames), stream.rate


def encode_all(
    audio_format: AudioFormat, samples: Samples, sample_rate: int, pieces: int = 5
) -> bytes:
    encoder = AudioEncoder(audio_format, sample_rate)
    parts = [encoder.encode(piece) for piece in np.array_split(samples, pieces)]
    return b"".join((*parts, encoder.finish()))


def correlation(heard: Heard, rate: int, samples: Samples, sample_rate: int) -> float:
    """How alike two sounds are at the best shift of up to 50 ms, 0 to 1."""
    t = np.arange(len(heard)) / rate
    original = np.interp(t, np.arange(len(samples)) / sample_rate, samples, right=0)
    size = 2 * len(heard)
    spectra = [np.fft.rfft(sound.astype(np.float64), size) for sound in (heard, original)]
    at_shift = np.fft.irfft(spectra[0] * spectra[1].conj(), size)[: int(0.05 * rate) + 1]
    return float(
        at_shift.max() / np.linalg.norm(heard.astype(np.float64)) / np.linalg.norm(original)
    )


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("audio_format", FORMATS)
def test_duration_rate_and_sound(audio_format: AudioFormat, sample_rate: int) -> None:
    samples = voice_like(sample_rate + 317, sample_rate)
    heard, rate = decoded(encode_all(audio_format, samples, sample_rate), audio_format)
    assert rate == (ENCODINGS[audio_format].sample_rate or sample_rate)
    excess_s = len(heard) / rate - len(samples) / sample_rate
    if audio_format in EXACT:
        assert abs(excess_s) <= 1 / rate
    else:
        assert 0 <= excess_s < 0.05
    assert correlation(heard, rate, samples, sample_rate) > 0.99


@pytest.mark.parametrize("count", range(24_000, 24_000 + 600, 37))
@pytest.mark.parametrize("audio_format", ["mp3", "aac"])
def test_silence_added_is_bounded_whatever_the_length(
    audio_format: AudioFormat, count: int
) -> None:
    samples = voice_like(count, 24_000)
    heard, rate = decoded(encode_all(audio_format, samples, 24_000), audio_format)
    assert 0 <= len(heard) / rate - count / 24_000 < 0.05


@pytest.mark.parametrize("sample_rate", [22_050, 24_000])
@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_lossless_formats_are_exact(audio_format: AudioFormat, sample_rate: int) -> None:
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, 30_011).astype(np.float32)
    samples[:4] = (1, -1, 0.5 / 32768, 1.5 / 32768)
    heard, rate = decoded(encode_all(audio_format, samples, sample_rate), audio_format)
    assert rate == sample_rate
    assert np.array_equal(heard, quantised(samples))


def test_pcm_of_24_khz_is_exact() -> None:
    samples = voice_like(24_000, 24_000)
    assert encode_all("pcm", samples, 24_000) == quantised(samples).tobytes()


@pytest.mark.parametrize("audio_format", FORMATS)
def test_pieces_make_no_difference(audio_format: AudioFormat) -> None:
    samples = voice_like(22_050, 22_050)
    whole = encode_all(audio_format, samples, 22_050, pieces=1)
    assert encode_all(audio_format, samples, 22_050, pieces=50) == whole


@pytest.mark.parametrize("audio_format", FORMATS)
def test_sound_comes_out_while_it_goes_in(audio_format: AudioFormat) -> None:
    samples = voice_like(48_000, 24_000)
    encoder = AudioEncoder(audio_format, 24_000)
    begun = encoder.encode(samples[:24_000])
    heard, rate = decoded(begun, audio_format)
    assert len(heard) / rate > 0.75
    assert correlation(heard, rate, samples[:24_000], 24_000) > 0.95
    assert encoder.encode(samples[24_000:24_000]) == b""


def test_wav_header_says_that_the_length_is_not_known() -> None:
    samples = voice_like(24_000, 24_000)
    encoded = encode_all("wav", samples, 24_000)
    assert encoded[:4] + encoded[8:16] + encoded[36:40] == b"RIFFWAVEfmt data"
    assert struct.unpack_from("<I", encoded, 4) == struct.unpack_from("<I", encoded, 40)
    assert struct.unpack_from("<I", encoded, 40) == (0xFFFFFFFF,)
    assert encoded[44:] == quantised(samples).tobytes()
    with wave.open(io.BytesIO(encoded)) as reader:  # reads what is there
        assert reader.readframes(reader.getnframes()) == encoded[44:]


@pytest.mark.parametrize("audio_format", FORMATS)
def test_shorter_than_one_frame(audio_format: AudioFormat) -> None:
    heard, rate = decoded(encode_all(audio_format, voice_like(100, 24_000), 24_000), audio_format)
    assert 100 / 24_000 <= len(heard) / rate + 1 / rate < 0.06


@pytest.mark.parametrize("audio_format", FORMATS)
def test_nothing_at_all(audio_format: AudioFormat) -> None:
    assert len(AudioEncoder(audio_format, 24_000).finish()) < 10_000


def test_slices_that_are_not_contiguous() -> None:
    samples = voice_like(48_000, 48_000)
    assert encode_all("pcm", samples[::2], 24_000) == quantised(samples[::2]).tobytes()


@pytest.mark.parametrize(
    "samples", [np.zeros(8), np.zeros(8, np.int16), np.zeros((2, 8), np.float32)]
)
def test_what_is_not_mono_float32_is_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match="float32"):
        AudioEncoder("wav", 24_000).encode(samples)


def test_rate_that_is_none() -> None:
    with pytest.raises(ValueError, match="rate"):
        AudioEncoder("wav", 0)
