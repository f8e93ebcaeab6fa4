"""Speech and transcription of a real server with real models, asked by the official client."""

from __future__ import annotations

import io
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import srt
import webvtt

from tests.contract.openai import conforms
from tests.server.real import Server

pytestmark = [
    pytest.mark.slow,
    # The client's notices about OpenAI's own service.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TEXT = "Hello there. This is a test of speech, with numbers such as 42 and $3.50."
FORMATS: Any = ["mp3", "opus", "aac", "flac", "wav", "pcm"]
SPEAKERS = ["tiny-kokoro", "tiny-vits", "tiny-vits-multi", "tiny-xtts", "tiny-bark"]


def decoded(data: bytes, kind: str) -> tuple[np.ndarray[Any, Any], int]:
    """Mono samples and their rate."""
    if kind == "pcm":
        return np.frombuffer(data, np.int16) / 2**15, 24_000
    with av.open(io.BytesIO(data)) as container:
        frames = [frame for frame in container.decode(audio=0)]
        pieces = [frame.to_ndarray() for frame in frames]
        joined = np.concatenate([each.reshape(-1) for each in pieces]).astype(float)
        if np.issubdtype(pieces[0].dtype, np.integer):
            joined /= np.iinfo(pieces[0].dtype).max
        return joined, frames[0].sample_rate


def speech(sdk: openai.OpenAI, model: str, kind: Any, **more: Any) -> bytes:
    with sdk.audio.speech.with_streaming_response.create(
        model=model, input=TEXT, voice="alloy", response_format=kind, **more
    ) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def as_wav(sdk: openai.OpenAI) -> tuple[np.ndarray[Any, Any], int]:
    return decoded(speech(sdk, "tts-1", "wav"), "wav")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_speech(
    sdk: openai.OpenAI, as_wav: tuple[np.ndarray[Any, Any], int], kind: str
) -> None:
    wav, rate = as_wav
    found, found_rate = decoded(speech(sdk, "tts-1", kind), kind)
    assert found.std() > 1e-4
    assert len(found) / found_rate == pytest.approx(len(wav) / rate, abs=0.06)
    assert found.std() == pytest.approx(wav.std(), rel=0.25)


@pytest.mark.parametrize("model", SPEAKERS)
def test_every_model_speaks(sdk: openai.OpenAI, model: str) -> None:
    samples, rate = decoded(speech(sdk, model, "wav"), "wav")
    assert len(samples) > rate / 10 and samples.std() > 1e-4


def test_voices_are_listed(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/audio/voices", timeout=180).json()
    models = {voice["model"] for voice in answer["data"]}
    assert models == set(SPEAKERS)


def test_a_transcript_in_every_format(sdk: openai.OpenAI) -> None:
    audio = ("speech.mp3", speech(sdk, "tts-1", "mp3"))

    def heard(kind: Any, **more: Any) -> Any:
        return sdk.audio.transcriptions.create(
            model="whisper-1", file=audio, response_format=kind, language="en", **more
        )

    text = heard("json").text
    assert heard("text").strip() == text.strip()
    verbose = heard("verbose_json", timestamp_granularities=["word", "segment"])
    assert conforms(verbose.model_dump(exclude_none=True), "CreateTranscriptionResponseVerboseJson")
    assert "".join(segment.text for segment in verbose.segments).strip() == text.strip()
    assert verbose.words
    assert [each.content for each in srt.parse(heard("srt"))]
    assert list(webvtt.from_buffer(io.StringIO(heard("vtt"))))
    events = list(heard("json", stream=True))
    assert events[-1].type == "transcript.text.done" and events[-1].text.strip() == text.strip()
    assert "".join(event.delta for event in events[:-1]).strip() == text.strip()
    translated = sdk.audio.translations.create(model="whisper-1", file=audio)
    assert isinstance(translated.text, str)


def test_a_voice_is_cloned_used_and_forgotten(server: Server, sdk: openai.OpenAI) -> None:
    rate = 24_000
    times = np.arange(5 * rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * times) * (1 + np.sin(2 * np.pi * 3 * times))
    sample = io.BytesIO()
    with av.open(sample, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        pcm = (np.clip(tone, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    made = httpx.post(
        f"{server.url}/v1/audio/voices",
        data={"name": "mine"},
        files={"audio_sample": ("me.wav", sample.getvalue(), "audio/wav")},
        timeout=180,
    )
    assert made.status_code == 200, made.text
    voice = made.json()["id"]
    with sdk.audio.speech.with_streaming_response.create(
        model="tiny-xtts", input="Hello there.", voice=voice, response_format="wav"
    ) as answer:
        cloned, _ = decoded(answer.read(), "wav")
    assert cloned.std() > 1e-4
    assert httpx.delete(f"{server.url}/v1/audio/voices/{voice}").status_code == 200
    with pytest.raises(openai.BadRequestError):
        sdk.audio.speech.create(model="tiny-xtts", input="Hello.", voice=voice)


def test_bad_input_is_told(sdk: openai.OpenAI) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"input": ""}, "input"),
        ({"input": "a " * 500_000}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"speed": 0}, "speed"),
    ]
    for fields, param in bad:
        arguments: Any = {"model": "tts-1", "input": "Hello.", "voice": "alloy", **fields}
        with pytest.raises(openai.BadRequestError) as raised:
            sdk.audio.speech.create(**arguments)
        assert raised.value.param == param
    for content in (b"", b"this is no audio at all, only text\n" * 100):
        with pytest.raises(openai.BadRequestError) as raised:
            sdk.audio.transcriptions.create(model="whisper-1", file=("a.mp3", content))
        assert raised.value.param == "file"
