"""Audio files decoded from memory: like the library does, and no more than is allowed."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.media.audio_input import decode_audio
from tests.engine.recordings import FILES, RATE, encode, silence, voice

pytestmark = pytest.mark.slow  # faster-whisper brings native libraries


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("kind", FILES)
def test_the_samples_are_those_of_the_library(kind: str, layout: str) -> None:
    import faster_whisper

    data = encode(voice(3), kind, layout=layout)
    found = decode_audio(data, rate=RATE, max_seconds=10)
    assert found.dtype == np.float32 and found.shape[0] == pytest.approx(3 * RATE, rel=0.06)
    assert found.std() > 0.01
    np.testing.assert_array_equal(found, faster_whisper.decode_audio(io.BytesIO(data)))


def test_another_rate_is_resampled() -> None:
    found = decode_audio(encode(voice(2)), rate=8000, max_seconds=10)
    assert found.shape == (16_000,)


def test_what_is_damaged_in_the_middle_is_left_out() -> None:
    whole = encode(voice(6), "mp3")
    third = len(whole) // 3
    damaged = whole[:third] + bytes(third // 4) + whole[third + third // 4 :]
    found = decode_audio(damaged, rate=RATE, max_seconds=10)
    # The library stops where the damage begins.
    assert 4.5 * RATE < len(found) < 6.2 * RATE
    cut = decode_audio(whole[:third], rate=RATE, max_seconds=10)
    assert RATE < len(cut) < 3 * RATE


@pytest.mark.parametrize("which", [0, 10, -1])
@pytest.mark.parametrize("kind", FILES)
def test_one_packet_that_cannot_be_decoded_is_left_out(kind: str, which: int) -> None:
    """As in the file of a recorder that was killed. Codecs report it by different errors."""
    whole = encode(voice(3), kind)
    with av.open(io.BytesIO(whole)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    packet = packets[which if len(packets) > which else -1]
    position = whole.index(packet)
    rest = whole[position + len(packet) :]
    damaged = whole[:position] + b"\xff" * len(packet) + rest
    found = decode_audio(damaged, rate=RATE, max_seconds=10)
    # Ogg leaves out the whole second whose checksum is wrong.
    assert 1.9 * RATE < len(found) <= 3.3 * RATE


def test_strict_decoding_refuses_what_is_damaged_in_the_middle() -> None:
    whole = encode(voice(6), "mp3")
    third = len(whole) // 3
    damaged = whole[:third] + bytes(third // 4) + whole[third + third // 4 :]
    assert len(decode_audio(whole, rate=RATE, max_seconds=10, strict=True))
    with pytest.raises(InvalidRequest, match="cannot be decoded") as raised:
        decode_audio(damaged, rate=RATE, max_seconds=10, strict=True, param="audio_sample")
    assert raised.value.param == "audio_sample"


def test_only_the_named_containers_are_opened() -> None:
    data = encode(voice(1), "flac")
    assert len(decode_audio(data, rate=RATE, max_seconds=10, containers="flac,mp3"))
    with pytest.raises(InvalidRequest):
        decode_audio(data, rate=RATE, max_seconds=10, containers="wav,mp3")


def test_floats_are_neither_rounded_nor_clipped() -> None:
    samples = np.linspace(-1.5, 1.5, 2 * RATE, dtype=np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_f32le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        output.mux([*stream.encode(frame), *stream.encode(None)])
    found = decode_audio(file.getvalue(), rate=RATE, max_seconds=10, sample_format="flt")
    np.testing.assert_array_equal(found, samples)
    assert decode_audio(file.getvalue(), rate=RATE, max_seconds=10).max() < 1


BAD = {
    "empty": b"",
    "text": b"this is no audio\n" * 100,
    "zeros": bytes(10_000),
    "noise": np.random.default_rng(0).bytes(50_000),
    "header": encode(silence(1))[:44],
    "half a header": encode(silence(1))[:30],
    "cut before the index": encode(voice(3), "m4a")[:2000],
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "rate 0": encode(silence(1))[:24] + bytes(8) + encode(silence(1))[32:],
    "gigahertz": encode(silence(1))[:27] + b"\x63" + encode(silence(1))[28:],
    # Three samples at 589 kHz are over before the first of the result.
    "no time": encode(silence(1))[:26] + b"\x09" + encode(silence(1))[27:84],
}


@pytest.mark.parametrize("name", BAD)
def test_no_audio_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_audio(BAD[name], rate=RATE, max_seconds=10)
    assert raised.value.param == "file"


@pytest.mark.parametrize("kind", FILES)
def test_a_longer_recording_is_refused(kind: str) -> None:
    data = encode(silence(4), kind)
    assert len(decode_audio(data, rate=RATE, max_seconds=5))
    with pytest.raises(InvalidRequest, match="longer than 3 seconds") as raised:
        decode_audio(data, rate=RATE, max_seconds=3)
    assert raised.value.param == "file"


def test_a_bomb_is_not_expanded() -> None:
    """An hour in half a megabyte, in a container that knows no duration."""
    packets = 0

    def count() -> None:
        nonlocal packets
        packets += 1

    quiet = np.zeros(600 * RATE, np.float32)
    with pytest.raises(InvalidRequest):
        decode_audio(encode(quiet, "mp3"), rate=RATE, max_seconds=20, check=count)
    # 36 ms a packet.
    assert 0 < packets < 1200
    packets = 0
    with pytest.raises(InvalidRequest):
        decode_audio(encode(quiet, "flac"), rate=RATE, max_seconds=20, check=count)
    assert packets == 0  # the container said so


def test_a_rate_that_no_converter_has_is_not_resampled() -> None:
    with pytest.raises(InvalidRequest, match="samples a second"):
        decode_audio(BAD["gigahertz"], rate=RATE, max_seconds=10)


def test_a_check_stops_it() -> None:
    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        decode_audio(encode(voice(1)), rate=RATE, max_seconds=10, check=stop)


def test_a_file_that_names_others_does_not_open_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.wav").write_bytes(encode(voice(1)))
    with pytest.raises(InvalidRequest):
        decode_audio(b"ffconcat version 1.0\nfile secret.wav\n", rate=RATE, max_seconds=10)
