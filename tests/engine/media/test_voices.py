"""Cloned voices: what is kept, what is refused, and that nothing is left of what was."""

from __future__ import annotations

import io
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.files import atomic
from engine.media import voices
from engine.media.voices import MAX_SAMPLE_BYTES, VoiceStore

RATE = 24_000
NOW = 1_700_000_000.0
MODEL = ModelConfig(id="speech", source="starter:tiny-xtts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "voices"


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(EngineConfig(data_dir=tmp_path, models=(MODEL,)), clock=lambda: NOW)


def tone(seconds: float, *, rate: int = RATE, level: float = 0.3) -> NDArray[np.float32]:
    times = np.arange(int(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * 220 * times)).astype(np.float32)


def wav(samples: NDArray[np.float32], *, rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        pcm = np.repeat(samples, channels)
        writer.writeframes((pcm * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def encoded(samples: NDArray[np.float32], container: str, codec: str, rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        fifo = av.AudioResampler(
            format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or 1024
        )
        for piece in [*fifo.resample(frame), *fifo.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return file.getvalue()


def kept(path: Path) -> NDArray[np.int16]:
    with wave.open(str(path)) as file:
        shape = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        assert shape == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_a_voice_is_kept_listed_and_deleted(store: VoiceStore, folder: Path) -> None:
    samples = tone(5)
    voice = store.add("  Zoë  ", wav(samples))
    assert voice.name == "Zoë"
    assert voice.created_at == int(NOW)
    assert voice.duration_s == 5.0
    assert voice.id.startswith("voice_")
    assert store.list() == (voice,)
    assert store.get(voice.id) == voice
    np.testing.assert_array_equal(
        kept(store.sample(voice.id)), (samples * 32767).round().astype(np.int16)
    )
    assert store.sample(voice.id).stat().st_mode & 0o077 == 0 or folder.stat().st_mode & 0o077 == 0
    store.delete(voice.id)
    assert store.list() == ()
    assert not list(folder.iterdir())
    for ask in (store.get, store.sample, store.delete):
        with pytest.raises(NotFound):
            ask(voice.id)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp3", "libmp3lame", 44_100),
        ("flac", "flac", 48_000),
        ("ogg", "libopus", 48_000),
        ("mp4", "aac", 44_100),
        ("adts", "aac", 22_050),
        ("webm", "libopus", 48_000),
    ],
)
def test_what_comes_becomes_mono_of_24_khz(
    store: VoiceStore, container: str, codec: str, rate: int
) -> None:
    voice = store.add("A", encoded(tone(4, rate=rate), container, codec, rate))
    samples = kept(store.sample(voice.id)).astype(np.float64)
    assert abs(len(samples) - 4 * RATE) < 0.1 * RATE
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * RATE / len(samples) == pytest.approx(220, abs=1)


def test_stereo_is_mixed(store: VoiceStore) -> None:
    voice = store.add("A", wav(tone(4, rate=48_000), rate=48_000, channels=2))
    assert len(kept(store.sample(voice.id))) == pytest.approx(4 * RATE, abs=100)


def not_finite() -> bytes:
    samples = tone(4)
    samples[1000] = np.nan
    header = wav(np.zeros(0, np.float32))
    size = samples.nbytes
    # Format 3 is IEEE float of 32 bit.
    chunk = b"fmt " + (16).to_bytes(4, "little") + (3).to_bytes(2, "little") + header[22:24]
    chunk += RATE.to_bytes(4, "little") + (RATE * 4).to_bytes(4, "little")
    chunk += (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    data = b"data" + size.to_bytes(4, "little") + samples.tobytes()
    return b"RIFF" + (4 + len(chunk) + len(data)).to_bytes(4, "little") + b"WAVE" + chunk + data


REFUSED = {
    "nothing": b"",
    "text": b"this is no sound at all, but a text" * 100,
    "short": wav(tone(2.5)),
    "long": wav(tone(61)),
    "silent": wav(np.zeros(5 * RATE, np.float32)),
    "quiet": wav(tone(5, level=0.001)),
    "clipped": wav(np.clip(tone(5, level=50), -1, 1)),
    "large": b"\0" * (MAX_SAMPLE_BYTES + 1),
    "not finite": not_finite(),
    "one sample a second": wav(tone(5), rate=1),
    "cut off": wav(tone(5))[: 44 + RATE],
    "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/x.wav\n#EXT-X-ENDLIST\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/hostname\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_recording_that_is_refused_leaves_nothing(
    store: VoiceStore, folder: Path, what: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        store.add("A", REFUSED[what])
    assert refused.value.param == "audio_sample"
    assert not folder.exists()


def test_a_bomb_is_not_unpacked(store: VoiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of silence in a few kilobytes: decoding stops at the limit."""
    decoded = 0
    resampler = av.AudioResampler

    class Counting:
        def __init__(self, **settings: Any) -> None:
            self._resampler = resampler(**settings)

        def resample(self, frame: Any) -> Any:
            nonlocal decoded
            decoded += frame.samples if frame is not None else 0
            return self._resampler.resample(frame)

    file = encoded(np.zeros(600 * 8000, np.float32), "flac", "flac", 8000)
    monkeypatch.setattr(av, "AudioResampler", Counting)
    with pytest.raises(InvalidRequest, match="60 seconds"):
        store.add("A", file)
    assert 0 < decoded < 62 * 8000


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, "a\nb", "a\0b"])
def test_names(store: VoiceStore, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        store.add(name, wav(tone(4)))
    assert refused.value.param == "name"


@pytest.mark.parametrize(
    "voice_id",
    ["", "..", "../voices", "voice_", "voice_" + "g" * 24, "voice_" + "0" * 24 + ".part"],
)
def test_ids_that_are_none(store: VoiceStore, folder: Path, voice_id: str) -> None:
    (folder / voice_id).mkdir(parents=True, exist_ok=True)
    for ask in (store.get, store.sample, store.delete):
        with pytest.raises(NotFound):
            ask(voice_id)
    assert folder.is_dir()


def test_a_failed_write_leaves_nothing(
    store: VoiceStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(OSError, match="No space"):
        store.add("A", wav(tone(4)))
    assert not list(folder.iterdir())


def test_what_a_crash_left_is_removed_and_voices_stay(tmp_path: Path, store: VoiceStore) -> None:
    voice = store.add("A", wav(tone(4)))
    unfinished = tmp_path / "voices" / f"voice_{'0' * 24}.part"
    unfinished.mkdir()
    (unfinished / "sample.wav").write_bytes(b"half")
    again = VoiceStore(EngineConfig(data_dir=tmp_path, models=(MODEL,)))
    assert again.list() == (voice,)
    assert not unfinished.exists()


def test_a_damaged_card_is_left_out(
    store: VoiceStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voice, damaged = store.add("A", wav(tone(4))), store.add("B", wav(tone(4)))
    (folder / damaged.id / "voice.json").write_text("{")
    assert store.list() == (voice,)
    assert damaged.id in caplog.text
    store.delete(damaged.id)


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    times = iter([30.0, 10.0, 20.0])
    store = VoiceStore(EngineConfig(data_dir=tmp_path, models=(MODEL,)), clock=lambda: next(times))
    for name in "CAB":
        store.add(name, wav(tone(4)))
    assert [voice.name for voice in store.list()] == ["A", "B", "C"]


def test_there_is_a_limit(store: VoiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices, "MAX_VOICES", 1)
    store.add("A", wav(tone(4)))
    with pytest.raises(Conflict):
        store.add("B", wav(tone(4)))
