"""Voice activity of recordings of read English, against faster-whisper's batch function."""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_whisper.vad import get_vad_model

from engine.errors import InvalidRequest
from engine.events import Samples
from engine.media import voice_activity
from engine.media.audio_input import decode_audio
from engine.media.turns import SpeechStarted, SpeechStopped, TurnDetector, TurnEvent
from engine.media.voice_activity import RATE, WINDOW, WINDOW_MS, VoiceActivity
from engine.runtimes.whisper.run import import_everything
from server.bench.quality.recordings import Clip, clips

pytestmark = pytest.mark.slow  # faster-whisper brings native libraries

recorded = pytest.mark.skipif(
    not clips(), reason="scripts/setup --dev has not fetched the recordings"
)

ENDS_S = (6.79, 2.74, 5.09, 5.83, 3.02)
"""Where the alignment of each clip has its last silence begin."""


@cache
def all_clips() -> tuple[tuple[Clip, Samples], ...]:
    return tuple((clip, decode_audio(clip.wav, rate=RATE, max_seconds=60)) for clip in clips())


def quiet(seconds: float) -> Samples:
    noise = np.random.default_rng(1).standard_normal(int(seconds * RATE))
    return (0.0005 * noise).astype(np.float32)


def turns_of(samples: Samples, **settings: Any) -> list[TurnEvent]:
    activity, turns = VoiceActivity(), TurnDetector(**settings)
    pieces = [samples[start : start + 320] for start in range(0, len(samples), 320)]  # 20 ms
    return [event for piece in pieces for event in turns.feed(activity.feed(piece), WINDOW_MS)]


@recorded
@pytest.mark.parametrize("size", [160, 777, 10**9])
def test_a_stream_has_the_probabilities_of_the_batch(size: int) -> None:
    from faster_whisper.vad import get_vad_model

    samples = np.concatenate([samples for _, samples in all_clips()])
    whole = samples[: len(samples) // WINDOW * WINDOW]
    assert len(whole) > 700 * WINDOW
    # The library clears the end of the last window that it is given, so it gets one more.
    batch = get_vad_model()(np.pad(whole, (0, WINDOW)))[:-1]
    activity = VoiceActivity()
    ends = [*range(0, len(samples), size), len(samples)]
    found = [each for a, b in pairwise(ends) for each in activity.feed(samples[a:b])]
    assert found == pytest.approx(batch.tolist(), abs=1e-4)


def test_streams_do_not_disturb_each_other() -> None:
    noise = np.random.default_rng(0).standard_normal(WINDOW * 20, np.float32) * np.float32(0.1)
    one, other, alone = VoiceActivity(), VoiceActivity(), VoiceActivity()
    mixed = []
    for start in range(0, len(noise), WINDOW):
        mixed += one.feed(noise[start : start + WINDOW])
        other.feed(-noise[start : start + WINDOW] * np.float32(3))
    assert mixed == pytest.approx(alone.feed(noise), abs=1e-5)


@recorded
def test_turns_begin_and_end_with_the_words() -> None:
    late_ms = []
    for (clip, samples), end_s in zip(all_clips(), ENDS_S, strict=True):
        audio = np.concatenate([quiet(1), samples, quiet(2)])
        begin_ms, end_ms = 1000 + 1000 * clip.starts_s[0], 1000 + 1000 * end_s
        # The readers pause for less than 700 ms.
        started, *inner, stopped = turns_of(audio, prefix_padding_ms=0, silence_duration_ms=700)
        assert not any(isinstance(event, SpeechStarted) for event in inner)
        assert isinstance(started, SpeechStarted) and isinstance(stopped, SpeechStopped)
        late_ms.append(started.at_ms - begin_ms)
        assert abs(stopped.speech_end_ms - end_ms) < 100
        assert stopped.at_ms - stopped.speech_end_ms == pytest.approx(700, abs=32)
        # With the padding nothing of the first word is lost.
        padded = turns_of(audio, silence_duration_ms=700)[0]
        assert padded == SpeechStarted(started.at_ms - 300) and padded.at_ms < begin_ms
    # The model hears vowels. Two clips begin with a quiet sound (-40 dB), 50 to 100 ms before.
    assert statistics.median(late_ms) < 100
    assert min(late_ms) > -32 and max(late_ms) < 150


def test_neither_silence_nor_noise_nor_clicks_start_a_turn() -> None:
    random = np.random.default_rng(0)
    time = np.arange(4 * RATE) / RATE
    clicks, bangs = np.zeros(4 * RATE), random.standard_normal(4 * RATE) * 0.001
    clicks[:: RATE // 2] = 1
    for start in range(RATE // 2, 4 * RATE, RATE):
        bangs[start : start + 800] += random.standard_normal(800) * np.exp(-np.arange(800) / 200)
    brown = np.cumsum(random.standard_normal(4 * RATE))
    sounds = {
        "silence": np.zeros(4 * RATE),
        "faint": quiet(4),
        "white": random.standard_normal(4 * RATE) * 0.3,
        "brown": (brown - brown.mean()) / np.abs(brown).max() / 2,
        "tone": 0.3 * np.sin(2 * np.pi * 440 * time),
        "hum": 0.1 * np.sign(np.sin(2 * np.pi * 50 * time)),
        "clicks": clicks,
        "bangs": bangs,
    }
    found = {name: turns_of(sound.astype(np.float32)) for name, sound in sounds.items()}
    assert {name: events for name, events in found.items() if events} == {}
    assert len(found) == 8


async def test_the_model_is_loaded_once_and_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    make = voice_activity._new_session

    def counted() -> Any:
        threads.append(threading.current_thread())
        return make()

    monkeypatch.setattr(voice_activity, "_MODELS", voice_activity._Models())
    monkeypatch.setattr(voice_activity, "_new_session", counted)
    await asyncio.gather(*[VoiceActivity.load() for _ in range(4)])
    assert len(VoiceActivity().feed(np.zeros(WINDOW, np.float32))) == 1
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_the_model_is_the_one_that_runtimes_load_at_their_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(voice_activity, "_MODELS", voice_activity._Models())
    import_everything()
    shared = VoiceActivity()
    assert shared._session is get_vad_model().session
    # Without such a runtime it is loaded here, and hears the same.
    monkeypatch.setattr(voice_activity, "_MODELS", voice_activity._Models())
    monkeypatch.delitem(sys.modules, "faster_whisper.vad")
    alone = VoiceActivity()
    assert alone._session is not get_vad_model().session
    assert alone.feed(quiet(1)) == shared.feed(quiet(1))


@pytest.mark.parametrize("missing", ["faster_whisper", "its model", "onnxruntime"])
async def test_without_the_detector_the_field_is_refused(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voice_activity, "_MODELS", voice_activity._Models())
    monkeypatch.delitem(sys.modules, "faster_whisper.vad", raising=False)
    if missing == "faster_whisper":
        monkeypatch.setattr(voice_activity, "find_spec", lambda name: None)
    elif missing == "its model":
        monkeypatch.setattr(voice_activity, "_MODEL", Path("assets", "another.onnx"))
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InvalidRequest, match="`turn_detection` needs") as raised:
        VoiceActivity()
    assert raised.value.param == "turn_detection"
    with pytest.raises(InvalidRequest):
        await VoiceActivity.load()
