"""Turns that are found in the audio. What is loud counts as speech here: Silero's model is tried
with real recordings in tests/engine/media."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.events import Samples
from engine.requests import TextRequest, TranscriptionRequest
from server.realtime import input_audio
from tests.server.realtime.conftest import Talk, Voices
from tests.server.realtime.test_conversation import tone

WINDOW = 512
"""Samples at 16 kHz."""


class Loudness:
    """In the place of `VoiceActivity`."""

    def __init__(self) -> None:
        self._waiting = np.zeros(0, np.float32)

    def feed(self, samples: Samples) -> Sequence[float]:
        samples = np.concatenate([self._waiting, samples])
        whole = len(samples) - len(samples) % WINDOW
        self._waiting = samples[whole:]
        windows = samples[:whole].reshape(-1, WINDOW)
        return [float(np.abs(window).max() > 0.05) for window in windows]


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_audio, "VoiceActivity", Loudness)


async def send(talk: Talk, *audio: str) -> None:
    for each in audio:
        await talk.connection.input_audio_buffer.append(audio=each)


def silence(seconds: float) -> str:
    return tone(seconds, level=0)


async def test_a_silence_ends_a_turn_and_it_is_answered(talk: Talk, voices: Voices) -> None:
    await talk.update(type="realtime", audio={"input": {"transcription": {}}})
    await send(talk, silence(1.0), tone(0.6), silence(0.3), silence(0.5))
    done = await talk.until("response.done")
    assert done.response.status == "completed"
    started, stopped = (
        talk.of(f"input_audio_buffer.speech_{each}")[0] for each in ("started", "stopped")
    )
    assert started.audio_start_ms == pytest.approx(700, abs=64)  # with 300 ms of padding
    assert stopped.audio_end_ms == pytest.approx(2100, abs=64)
    item_id = talk.of("input_audio_buffer.committed")[0].item_id
    assert {started.item_id, stopped.item_id} == {item_id}
    # Transcribed once, at the pause that became the end: the silence costs no time twice.
    heard = [each for each in voices.requests if isinstance(each, TranscriptionRequest)]
    assert [(len(each.audio) - 44) / 32 for each in heard] == [pytest.approx(1200, abs=100)]
    chats = [each for each in voices.requests if isinstance(each, TextRequest)]
    assert chats[-1].body["messages"] == [{"role": "user", "content": voices.heard}]


async def test_who_speaks_into_an_answer_ends_it(talk: Talk, voices: Voices) -> None:
    voices.may_go_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    await talk.until("response.output_audio_transcript.delta")
    await send(talk, tone(0.2))
    done = await talk.until("response.done")
    assert done.response.status == "cancelled"
    assert done.response.status_details.reason == "turn_detected"
    assert "TextRequest" in voices.ended
    voices.may_go_on.set()
    await send(talk, tone(0.3), silence(0.8))
    assert (await talk.until("response.done")).response.status == "completed"


async def test_an_answer_may_be_left_alone(talk: Talk, voices: Voices) -> None:
    detection = {"type": "server_vad", "interrupt_response": False, "create_response": False}
    await talk.update(type="realtime", audio={"input": {"turn_detection": detection}})
    voices.may_go_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    await talk.until("response.output_audio_transcript.delta")
    await send(talk, tone(0.4), silence(0.8))
    await talk.until("input_audio_buffer.committed")
    voices.may_go_on.set()
    assert (await talk.until("response.done")).response.status == "completed"


async def test_a_whole_sentence_ends_a_turn_sooner(talk: Talk, voices: Voices) -> None:
    await talk.update(
        type="realtime", audio={"input": {"turn_detection": {"type": "semantic_vad"}}}
    )
    voices.heard = "Who are you?"
    await send(talk, tone(0.6), silence(0.3))
    for _ in range(30):
        await send(talk, silence(0.1))
        # Its answer shows that the audio before was taken: the sentence is known after some.
        await talk.connection.conversation.item.retrieve(item_id="nobody")
        await talk.until("error")
    stopped = talk.of("input_audio_buffer.speech_stopped")[0]
    assert stopped.audio_end_ms < 600 + 2_000  # without a mark it would wait longer
    if not talk.of("response.done"):
        await talk.until("response.done")
    assert talk.of("response.done")[0].response.status == "completed"
