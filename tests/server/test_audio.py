"""Speech and voices, with the official client over real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import openai
import pytest
from openai.types.audio.speech_create_params import VoiceID

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, LoadFailed, RuntimeFailed
from engine.events import Event, Speech, Word
from engine.media.audio_output import ENCODINGS, AudioFormat
from engine.requests import Priority, Request, SpeechRequest
from engine.runtimes.base import Prepared, Voice
from tests.contract.openai import conforms
from tests.engine.media.test_audio_output import correlation, decoded, quantised, voice_like
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for

SPEECH = "/v1/audio/speech"
VOICES = "/v1/audio/voices"
RATE = 24_000
SAMPLES = voice_like(3 * RATE + 1000, RATE)
PIECES = np.array_split(SAMPLES, 3)
FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
WORDS = (Word(" one", 0.0, 0.5), Word(" two", 1.25, 1.5))
MODELS = [
    {"id": "small", "aliases": ["tts-1"], "source": "none", "runtime": "fake", "task": "speech"},
    {"id": "other", "source": "none", "runtime": "fake", "task": "speech"},
    {"id": "text", "source": "none", "runtime": "fake"},
    {
        "id": "broken",
        "source": "none",
        "runtime": "fake",
        "task": "speech",
        "options": {"error": "the file is torn"},
    },
]


async def speak(request: SpeechRequest) -> AsyncGenerator[Event, None]:
    """Three sentences; the words belong to the second."""
    for index, piece in enumerate(PIECES):
        yield Speech(piece, RATE, WORDS if index == 1 and request.word_times else ())


class Halting:
    """Speaks two sentences, and only when the test lets it a third, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_go_on = asyncio.Event()
        self._error = error

    async def __call__(self, request: SpeechRequest) -> AsyncGenerator[Event, None]:
        for piece in PIECES[:2]:
            yield Speech(piece, RATE)
        await self.may_go_on.wait()
        if self._error is not None:
            raise self._error
        yield Speech(PIECES[2], RATE)


class SpeechRuntime(FakeRuntime):
    """A fake with voices, which refuses what runtimes refuse before they load anything."""

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if not isinstance(request, SpeechRequest) or model.task != "speech":
            raise InvalidRequest("It does not speak.", param="model")
        if request.voice not in (None, "anna", "bert"):
            raise InvalidRequest(f"There is no voice {request.voice!r}.", param="voice")
        return super().prepare(model, request)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        options = self.options(model)
        if options.error is not None:
            raise LoadFailed(options.error)
        if model.id != "small":
            return (Voice("only", "Only"),)
        return (Voice("anna", "Anna", "de"), Voice("bert", "Bert", "en-gb"))


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = SpeechRuntime()
    runtime.answer = speak
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path, models=MODELS, max_queue_per_model=1)


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture
async def plain(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Sends what the official client would not."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


def events_of(text: str) -> list[dict[str, Any]]:
    """The documents of a stream, each under the name it has itself."""
    documents = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document.get('type', 'error')}"
        documents.append(document)
    return documents


def recording(seconds: float = 4.0) -> bytes:
    """A WAV file that can be cloned from."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(quantised(voice_like(int(seconds * RATE), RATE)).tobytes())
    return file.getvalue()


DATABASES = ("jobs.", "batches.", "files.", "uploads.", "responses.", "vector", "usage.", "keys.")


def files_in(folder: Path) -> set[Path]:
    """All but the databases, which are being opened while the first requests come."""
    found = {path for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.name.startswith(DATABASES)}


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_every_format(sdk: openai.AsyncOpenAI, audio_format: AudioFormat) -> None:
    async with sdk.audio.speech.with_streaming_response.create(
        model="small", voice="anna", input="Good morning.", response_format=audio_format
    ) as response:
        assert response.headers["content-type"] == ENCODINGS[audio_format].media_type
        assert response.headers["transfer-encoding"] == "chunked"
        assert "x-roundhouse-run-ms" in response.headers
        encoded = b"".join([piece async for piece in response.iter_bytes()])
    heard, rate = decoded(encoded, audio_format)
    assert rate == (ENCODINGS[audio_format].sample_rate or RATE)
    assert abs(len(heard) / rate - len(SAMPLES) / RATE) < 0.05
    if audio_format in ("flac", "wav", "pcm"):
        assert np.array_equal(heard, quantised(SAMPLES))
    else:
        assert correlation(heard, rate, SAMPLES, RATE) > 0.99


async def test_what_is_not_said_is_the_models_choice(
    plain: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    answer = await plain.post(SPEECH, json={"model": "tts-1", "input": "A."})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/mpeg")
    (request,) = runtime.requests
    assert request == SpeechRequest(
        model="tts-1", text="A.", request_id=answer.headers["x-request-id"]
    )
    assert request.scheduling.priority is Priority.INTERACTIVE


async def test_everything_is_passed_on(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    await sdk.audio.speech.create(
        model="small",
        voice={"id": "bert"},
        input=" Two. ",
        speed=4,
        instructions="Whisper.",
        stream_format="sse",
        extra_body={"language": "en-gb", "word_times": True, "seed": 7},
        extra_headers={"x-roundhouse-priority": "batch", "x-roundhouse-timeout": "9"},
    )
    (request,) = runtime.requests
    assert (request.text, request.voice, request.voice_sample) == (" Two. ", "bert", None)
    assert (request.speed, request.language, request.seed) == (4.0, "en-gb", 7)
    assert (request.word_times, request.scheduling.priority) == (True, Priority.BATCH)
    assert request.scheduling.timeout_s == 9


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_first_audio_comes_before_the_last_is_made(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, audio_format: AudioFormat
) -> None:
    halting = runtime.answer = Halting()
    async with sdk.audio.speech.with_streaming_response.create(
        model="small", voice="anna", input="A.", response_format=audio_format
    ) as response:
        encoded = b""
        async for piece in response.iter_bytes():
            encoded += piece
            if not halting.may_go_on.is_set() and len(encoded) > 1000:
                heard, rate = decoded(encoded, audio_format)
                if len(heard) / rate > 1.7:  # of two seconds
                    halting.may_go_on.set()
    heard, rate = decoded(encoded, audio_format)
    assert abs(len(heard) / rate - len(SAMPLES) / RATE) < 0.05


class TestEvents:
    async def test_deltas_are_the_audio(self, plain: httpx.AsyncClient) -> None:
        body = {"model": "small", "input": "A.", "response_format": "wav", "stream_format": "sse"}
        answer = await plain.post(SPEECH, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "x-roundhouse-queue-ms" in answer.headers
        *deltas, done = events_of(answer.text)
        assert all(conforms(each, "CreateSpeechResponseStreamEvent") for each in (*deltas, done))
        assert [each["type"] for each in deltas] == ["speech.audio.delta"] * 3
        assert done["type"] == "speech.audio.done"
        encoded = b"".join(base64.b64decode(each["audio"]) for each in deltas)
        assert np.array_equal(decoded(encoded, "wav")[0], quantised(SAMPLES))

    async def test_words_come_with_their_audio(self, plain: httpx.AsyncClient) -> None:
        body = {"model": "small", "input": "A.", "stream_format": "sse", "word_times": True}
        events = events_of((await plain.post(SPEECH, json=body)).text)
        kinds = [each["type"].removeprefix("speech.audio.") for each in events]
        assert kinds == ["delta", "words", "delta", "delta", "delta", "done"]
        assert events[1]["words"] == [
            {"word": "one", "start": 0.0, "end": 0.5},
            {"word": "two", "start": 1.25, "end": 1.5},
        ]

    async def test_failure_part_way_is_the_last_event(
        self, plain: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        halting = runtime.answer = Halting(RuntimeFailed("the voice broke"))
        halting.may_go_on.set()
        body = {"model": "small", "input": "A.", "stream_format": "sse"}
        answer = await plain.post(SPEECH, json=body)
        *deltas, error = events_of(answer.text)
        assert [each["type"] for each in deltas] == ["speech.audio.delta"] * 2
        assert conforms(error, "ErrorResponse")
        assert error["error"]["message"] == "the voice broke"
        runtime.answer = speak
        assert (await plain.post(SPEECH, json=body)).status_code == 200


async def test_audio_that_fails_part_way_is_seen_to_be_torn(
    plain: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    halting = runtime.answer = Halting(RuntimeFailed("the voice broke"))
    body = {"model": "small", "input": "A.", "response_format": "pcm"}
    async with plain.stream("POST", SPEECH, json=body) as answer:
        assert answer.status_code == 200
        halting.may_go_on.set()
        with pytest.raises(httpx.RemoteProtocolError):
            await answer.aread()
    runtime.answer = speak
    assert (await plain.post(SPEECH, json=body)).status_code == 200


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
async def test_failure_before_the_first_byte_is_an_ordinary_answer(
    plain: httpx.AsyncClient, runtime: FakeRuntime, stream_format: str
) -> None:
    async def fail(request: SpeechRequest) -> AsyncGenerator[Event, None]:
        raise RuntimeFailed("the voice broke")
        yield

    async def give_nonsense(request: SpeechRequest) -> AsyncGenerator[Event, None]:
        yield Speech(np.zeros((2, 9), np.float32), RATE)

    for answer_given in (fail, give_nonsense):
        runtime.answer = answer_given
        body = {"model": "small", "input": "A.", "stream_format": stream_format}
        answer = await plain.post(SPEECH, json=body)
        assert answer.status_code == 500
        assert conforms(answer.json(), "ErrorResponse")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": None}, "model"),
        ({"model": "text"}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": " \n"}, "input"),
        ({"input": "x" * 2**20}, "input"),
        ({"input": ["a"]}, "input"),
        ({"voice": ""}, "voice"),
        ({"voice": "nobody"}, "voice"),
        ({"voice": "../../etc/passwd"}, "voice"),
        ({"voice": "voice_" + "0" * 24}, "voice"),
        ({"voice": {"id": "nobody"}}, "voice"),
        ({"voice": {"name": "anna"}}, "voice"),
        ({"voice": "x" * 257}, "voice"),
        ({"speed": 0}, "speed"),
        ({"speed": 0.24}, "speed"),
        ({"speed": 4.1}, "speed"),
        ({"speed": "1"}, "speed"),
        ({"speed": True}, "speed"),
        ({"response_format": "ogg"}, "response_format"),
        ({"stream_format": "json"}, "stream_format"),
        ({"word_times": True}, "word_times"),
        ({"instructions": "x" * 4097}, "instructions"),
        ({"language": "x" * 17}, "language"),
        ({"seed": -1}, "seed"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)
async def test_wrong_field_is_named(
    client: httpx.AsyncClient,
    engine: Engine,
    runtime: FakeRuntime,
    body: dict[str, Any],
    param: str,
) -> None:
    document = {"model": "small", "input": "A.", "voice": "anna", **body}
    answer = await client.post(SPEECH, json=document)
    assert answer.status_code == 400
    assert conforms(answer.json(), "ErrorResponse")
    assert answer.json()["error"]["param"] == param
    assert runtime.requests == []
    assert engine.status().ledger.granted_bytes == 0, "the model was loaded"


async def test_not_a_number(plain: httpx.AsyncClient) -> None:
    for speed in ("NaN", "Infinity", "1e999"):
        text = f'{{"model": "small", "input": "A.", "speed": {speed}}}'
        assert (await plain.post(SPEECH, content=text)).status_code == 400


async def test_unknown_model(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.audio.speech.create(model="smal", voice="anna", input="A.")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_body_beyond_the_limit(plain: httpx.AsyncClient) -> None:
    answer = await plain.post(SPEECH, content=b" " * (32 * 2**20 + 1))
    assert answer.status_code == 413


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("before", [0, 1])
async def test_client_that_leaves_ends_the_run(
    url: str, engine: Engine, runtime: FakeRuntime, stream_format: str, before: int
) -> None:
    class Speaking(Stuck):
        async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
            for piece in PIECES[:before]:
                yield Speech(piece, RATE)
            async for event in super().__call__(request):
                yield event

    stuck = runtime.answer = Speaking()
    body = {"model": "small", "input": "A.", "stream_format": stream_format}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        call = asyncio.create_task(client.post(SPEECH, json=body))
        await wait_for(stuck.began)
        assert engine.model_status("small").leases == 1
        call.cancel()
        await asyncio.wait([call])
    await wait_for(stuck.ended)
    runtime.answer = speak
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        assert (await client.post(SPEECH, json=body)).status_code == 200


class TestVoices:
    async def test_every_voice_of_every_model(self, plain: httpx.AsyncClient) -> None:
        answer = await plain.get(VOICES)
        assert answer.status_code == 200
        assert answer.json() == {
            "object": "list",
            "data": [
                voice("anna", "Anna", "small", "de"),
                voice("bert", "Bert", "small", "en-gb"),
                voice("only", "Only", "other", None),
            ],
            "voices": [
                {"id": "anna", "name": "Anna"},
                {"id": "bert", "name": "Bert"},
                {"id": "only", "name": "Only"},
            ],
        }, "a model that is broken hides no other"

    async def test_the_names_of_the_speech_models(self, plain: httpx.AsyncClient) -> None:
        names = (await plain.get("/v1/audio/models")).json()["models"]
        assert {"id": "small"} in names and {"id": "tts-1"} in names
        assert {"id": "text"} not in names

    async def test_voices_of_one_model(self, plain: httpx.AsyncClient) -> None:
        answer = await plain.get(VOICES, params={"model": "tts-1"})
        assert [each["id"] for each in answer.json()["data"]] == ["anna", "bert"]
        assert {each["model"] for each in answer.json()["data"]} == {"small"}

    @pytest.mark.parametrize(
        ("query", "status", "param"),
        [
            ({"model": "nobody"}, 404, "model"),
            ({"model": "text"}, 400, "model"),
            ({"model": ""}, 400, "model"),
            ({"model": "broken"}, 500, None),
            ({"modle": "small"}, 400, "modle"),
        ],
    )
    async def test_wrong_query(
        self, plain: httpx.AsyncClient, query: dict[str, str], status: int, param: str | None
    ) -> None:
        answer = await plain.get(VOICES, params=query)
        assert answer.status_code == status
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param

    async def test_add_speak_and_delete(
        self, sdk: openai.AsyncOpenAI, plain: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        answer = await plain.post(
            VOICES,
            data={"name": "Me", "consent": "cons_1"},
            files={"audio_sample": ("me.wav", recording())},
        )
        assert answer.status_code == 200
        assert conforms(answer.json(), "VoiceResource")
        added = answer.json()
        assert added["name"] == "Me"
        listed = (await plain.get(VOICES, params={"model": "small"})).json()["data"]
        assert listed[-1] == {**added, "model": None, "language": None}

        asked: str | VoiceID
        for asked in (added["id"], VoiceID(id=added["id"])):
            await sdk.audio.speech.create(model="small", voice=asked, input="A.")
            request = runtime.requests[-1]
            assert (request.voice, request.voice_sample.is_file()) == (None, True)

        deleted = await plain.delete(f"{VOICES}/{added['id']}")
        assert deleted.json() == {"id": added["id"], "object": "audio.voice", "deleted": True}
        assert not request.voice_sample.exists()
        assert (await plain.delete(f"{VOICES}/{added['id']}")).status_code == 404
        assert len((await plain.get(VOICES)).json()["data"]) == 3
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.audio.speech.create(model="small", voice=added["id"], input="A.")
        assert caught.value.param == "voice"

    @pytest.mark.parametrize(
        ("name", "sample", "param"),
        [
            ("Me", None, "audio_sample"),
            ("Me", b"", "audio_sample"),
            ("Me", b"this is text", "audio_sample"),
            ("Me", recording(1.0), "audio_sample"),
            ("", recording(), "name"),
            (None, recording(), "name"),
        ],
    )
    async def test_what_cannot_be_cloned(
        self,
        plain: httpx.AsyncClient,
        tmp_path: Path,
        name: str | None,
        sample: bytes | None,
        param: str,
    ) -> None:
        before = files_in(tmp_path / "data")
        answer = await plain.post(
            VOICES,
            data={"consent": "cons_1"} if name is None else {"name": name},
            files={"other" if sample is None else "audio_sample": ("me.mp3", sample or b"")},
        )
        assert answer.status_code == 400
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param
        assert files_in(tmp_path / "data") == before

    async def test_json_is_no_recording(self, plain: httpx.AsyncClient) -> None:
        answer = await plain.post(VOICES, json={"name": "Me", "audio_sample": "AAAA"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "audio_sample")


def voice(voice_id: str, name: str, model: str, language: str | None) -> dict[str, Any]:
    return {
        "id": voice_id,
        "object": "audio.voice",
        "name": name,
        "model": model,
        "language": language,
    }
