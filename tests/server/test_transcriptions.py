"""Transcriptions and translations, with the official client over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import srt
import webvtt
from pydantic import TypeAdapter

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, RuntimeFailed
from engine.events import Cut, Event, Heard, Segment, Word
from engine.requests import Priority, Request, TranscriptionOperation, TranscriptionRequest
from engine.runtimes.base import Prepared
from server.languages import LANGUAGES
from server.schemas.audio import HeardLanguage, Language
from tests.contract.openai import conforms
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.test_audio import events_of, files_in
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
PATHS = (TRANSCRIPTIONS, TRANSLATIONS)
FILE = ("a.mp3", b"sound")
HEARD = Heard("de", 3725.5)
TEXT = "Hello & good <morning>. It --> is\n\nlate."


def segment(number: int, start_s: float, end_s: float, text: str, *words: Word) -> Segment:
    return Segment(
        id=number,
        start_s=start_s,
        end_s=end_s,
        text=text,
        seek=100 * number,
        tokens=(50364, 2425 + number),
        temperature=0.0,
        avg_logprob=-0.25,
        compression_ratio=1.5,
        no_speech_prob=0.01,
        words=words,
    )


WORDS = (Word(" Hello", 0.0, 0.4), Word(" &", 0.4, 0.6), Word(" late.", 3724.0, 3725.25))
SEGMENTS = (
    segment(0, 0.0, 2.5, " Hello & good <morning>.", *WORDS[:2]),
    segment(1, 2.5, 2.5, " It --> is\n\n"),
    segment(2, 3723.004, 3725.25, "late.", *WORDS[2:]),
)
SUBTITLES = ["Hello & good <morning>.", "It -> is", "late."]


async def write_down(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
    """What was heard, as it was told to a test."""
    if not request.audio.startswith(b"sound"):
        raise InvalidRequest("The file is no audio.", param="file")
    yield HEARD
    for each in SEGMENTS:
        yield each


async def hear_silence(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
    yield HEARD


class TranscriptionRuntime(FakeRuntime):
    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if not isinstance(request, TranscriptionRequest) or model.task != "transcribe":
            raise InvalidRequest("It does not listen.", param="model")
        return super().prepare(model, request)


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = TranscriptionRuntime()
    runtime.answer = write_down
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    models = [
        {"id": "small", "source": "none", "runtime": "fake", "task": "transcribe"},
        {"id": "text", "source": "none", "runtime": "fake"},
    ]
    return fake_engine(runtime, tmp_path, models=models, max_queue_per_model=1)


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


class TestTranscription:
    async def test_json(self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
        raw = await sdk.audio.transcriptions.with_raw_response.create(model="small", file=FILE)
        document = json.loads(raw.content)
        assert conforms(document, "CreateTranscriptionResponseJson")
        assert document == {"text": TEXT, "usage": {"type": "duration", "seconds": 3725.5}}
        assert raw.parse().text == TEXT
        assert float(raw.headers["x-roundhouse-run-ms"]) > 0
        assert runtime.requests == [
            TranscriptionRequest(
                model="small", audio=FILE[1], request_id=raw.headers["x-request-id"]
            )
        ]

    async def test_everything_is_passed_on(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        await sdk.audio.transcriptions.create(
            model="small",
            file=FILE,
            language="de",
            prompt="Earlier",
            temperature=0.5,
            response_format="verbose_json",
            timestamp_granularities=["word"],
            extra_body={"vad": True, "hotwords": "Roundhouse"},
            extra_headers={"x-roundhouse-priority": "batch", "x-roundhouse-timeout": "9"},
        )
        (request,) = runtime.requests
        assert request.operation is TranscriptionOperation.TRANSCRIPTION
        assert (request.language, request.prompt, request.temperature) == ("de", "Earlier", 0.5)
        assert (request.word_times, request.vad, request.hotwords) == (True, True, "Roundhouse")
        assert (request.scheduling.priority, request.scheduling.timeout_s) == (Priority.BATCH, 9)

    @pytest.mark.parametrize("strategy", ["auto", {"type": "server_vad"}])
    async def test_openai_names_of_our_extensions(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime, strategy: Any
    ) -> None:
        await sdk.audio.transcriptions.create(
            model="small",
            file=FILE,
            chunking_strategy=strategy,
            extra_body={"keywords": ["Round", "house"]},
        )
        assert (runtime.requests[0].vad, runtime.requests[0].hotwords) == (True, "Round, house")

    @pytest.mark.parametrize(
        ("granularities", "has"),
        [
            ([], {"segments"}),
            (["segment"], {"segments"}),
            (["word"], {"words"}),
            (["word", "segment"], {"words", "segments"}),
        ],
    )
    async def test_verbose_json(
        self, sdk: openai.AsyncOpenAI, granularities: Any, has: set[str]
    ) -> None:
        raw = await sdk.audio.transcriptions.with_raw_response.create(
            model="small",
            file=FILE,
            response_format="verbose_json",
            timestamp_granularities=granularities,
        )
        document = json.loads(raw.content)
        assert conforms(document, "CreateTranscriptionResponseVerboseJson")
        assert (document["task"], document["language"]) == ("transcribe", "german")
        assert (document["text"], document["duration"]) == (TEXT, 3725.5)
        assert document["usage"] == {"type": "duration", "seconds": 3725.5}
        assert {"words", "segments"} & document.keys() == has
        if "words" in has:
            assert document["words"] == [
                {"word": "Hello", "start": 0.0, "end": 0.4},
                {"word": "&", "start": 0.4, "end": 0.6},
                {"word": "late.", "start": 3724.0, "end": 3725.25},
            ]
        if "segments" in has:
            assert [each["id"] for each in document["segments"]] == [0, 1, 2]
            assert document["segments"][2] == {
                "id": 2,
                "seek": 200,
                "start": 3723.004,
                "end": 3725.25,
                "text": "late.",
                "tokens": [50364, 2427],
                "temperature": 0.0,
                "avg_logprob": -0.25,
                "compression_ratio": 1.5,
                "no_speech_prob": 0.01,
            }

    async def test_language_without_a_name_keeps_its_code(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        async def hear_klingon(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
            yield Heard("tlh", 1.0)

        runtime.answer = hear_klingon
        answer = await sdk.audio.transcriptions.create(
            model="small", file=FILE, response_format="verbose_json"
        )
        assert answer.language == "tlh"
        assert len(LANGUAGES) == 100

    async def test_text(self, sdk: openai.AsyncOpenAI) -> None:
        raw = await sdk.audio.transcriptions.with_raw_response.create(
            model="small", file=FILE, response_format="text"
        )
        assert raw.headers["content-type"] == "text/plain; charset=utf-8"
        assert raw.text == f"{TEXT}\n"

    async def test_srt(self, sdk: openai.AsyncOpenAI) -> None:
        text = await sdk.audio.transcriptions.create(
            model="small", file=FILE, response_format="srt"
        )
        assert isinstance(text, str)
        cues = list(srt.parse(text, ignore_errors=False))
        assert [cue.index for cue in cues] == [1, 2, 3]
        assert [cue.content for cue in cues] == SUBTITLES
        assert (cues[0].start, cues[0].end) == (timedelta(0), timedelta(seconds=2.5))
        assert cues[1].end > cues[1].start, "players drop a cue that takes no time"
        assert cues[2].start == timedelta(hours=1, minutes=2, seconds=3, milliseconds=4)
        assert "01:02:03,004 --> 01:02:05,250" in text

    async def test_vtt(self, sdk: openai.AsyncOpenAI) -> None:
        raw = await sdk.audio.transcriptions.with_raw_response.create(
            model="small", file=FILE, response_format="vtt"
        )
        assert raw.headers["content-type"] == "text/vtt; charset=utf-8"
        cues = list(webvtt.from_string(raw.text))
        assert [cue.raw_text for cue in cues] == [
            "Hello &amp; good &lt;morning&gt;.",
            "It -&gt; is",
            "late.",
        ]
        assert [cue.start for cue in cues] == ["00:00:00.000", "00:00:02.500", "01:02:03.004"]
        assert [cue.end for cue in cues] == ["00:00:02.500", "00:00:02.501", "01:02:05.250"]

    @pytest.mark.parametrize(
        ("response_format", "expected"),
        [("json", ""), ("text", "\n"), ("srt", ""), ("vtt", "WEBVTT\n\n"), ("verbose_json", "")],
    )
    async def test_silence(
        self,
        sdk: openai.AsyncOpenAI,
        runtime: FakeRuntime,
        response_format: Any,
        expected: str,
    ) -> None:
        runtime.answer = hear_silence
        raw = await sdk.audio.transcriptions.with_raw_response.create(
            model="small", file=FILE, response_format=response_format
        )
        is_json = response_format.endswith("json")
        assert (json.loads(raw.content)["text"] if is_json else raw.text) == expected


@pytest.mark.parametrize("stream", ["false", "true"])
async def test_a_header_says_what_was_cut(
    plain: httpx.AsyncClient, runtime: FakeRuntime, stream: str
) -> None:
    async def cut(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
        yield Cut("hotwords", 111, 300)
        yield Cut("prompt", 112, 250)
        async for event in write_down(request):
            yield event

    form = {"model": "small", "stream": stream}
    answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
    assert "x-roundhouse-cut" not in answer.headers
    runtime.answer = cut
    answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
    assert answer.status_code == 200
    assert answer.headers["x-roundhouse-cut"] == "hotwords=111/300, prompt=112/250"


class TestStream:
    @pytest.mark.parametrize("response_format", ["json", "text"])
    async def test_deltas_then_the_whole(
        self, plain: httpx.AsyncClient, response_format: str
    ) -> None:
        form = {"model": "small", "stream": "true", "response_format": response_format}
        answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "x-roundhouse-run-ms" in answer.headers
        *deltas, done = events_of(answer.text)
        assert all(
            conforms(each, "CreateTranscriptionResponseStreamEvent") for each in (*deltas, done)
        )
        assert [each["type"] for each in deltas] == ["transcript.text.delta"] * 3
        assert done == {"type": "transcript.text.done", "text": TEXT}
        assert "".join(each["delta"] for each in deltas) == TEXT

    async def test_each_segment_as_soon_as_it_is_known(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        may_go_on = asyncio.Event()

        async def halt(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
            yield HEARD
            yield SEGMENTS[0]
            await may_go_on.wait()
            yield SEGMENTS[2]

        runtime.answer = halt
        stream = await sdk.audio.transcriptions.create(model="small", file=FILE, stream=True)
        got = []
        async for event in stream:
            got.append(event.type)
            may_go_on.set()
        assert got == ["transcript.text.delta"] * 2 + ["transcript.text.done"]

    async def test_silence(self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
        runtime.answer = hear_silence
        stream = await sdk.audio.transcriptions.create(model="small", file=FILE, stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events] == ["transcript.text.done"]

    async def test_failure_part_way_is_the_last_event(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        async def fail(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
            yield HEARD
            yield SEGMENTS[0]
            raise RuntimeFailed("out of breath")

        runtime.answer = fail
        stream = await sdk.audio.transcriptions.create(model="small", file=FILE, stream=True)
        with pytest.raises(openai.APIError, match="out of breath"):
            [event async for event in stream]

    async def test_failure_before_the_first_segment_is_an_ordinary_answer(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        async def fail(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
            yield HEARD
            raise InvalidRequest("The file is torn.", param="file")

        runtime.answer = fail
        with pytest.raises(openai.BadRequestError, match="torn"):
            await sdk.audio.transcriptions.create(model="small", file=FILE, stream=True)


class TestTranslation:
    async def test_json(self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
        raw = await sdk.audio.translations.with_raw_response.create(
            model="small", file=FILE, prompt="Earlier", temperature=1, extra_body={"vad": True}
        )
        document = json.loads(raw.content)
        assert conforms(document, "CreateTranslationResponseJson")
        assert document == {"text": TEXT}
        (request,) = runtime.requests
        assert request.operation is TranscriptionOperation.TRANSLATION
        assert (request.prompt, request.temperature, request.vad) == ("Earlier", 1, True)
        assert request.scheduling.priority is Priority.INTERACTIVE

    async def test_verbose_json(self, sdk: openai.AsyncOpenAI) -> None:
        raw = await sdk.audio.translations.with_raw_response.create(
            model="small", file=FILE, response_format="verbose_json"
        )
        document = json.loads(raw.content)
        assert conforms(document, "CreateTranslationResponseVerboseJson")
        assert (document["task"], document["language"]) == ("translate", "english")
        assert len(document["segments"]) == 3
        assert "words" not in document

    async def test_subtitles_and_text(self, sdk: openai.AsyncOpenAI) -> None:
        create = sdk.audio.translations.with_raw_response.create
        subrip = await create(model="small", file=FILE, response_format="srt")
        assert [cue.content for cue in srt.parse(subrip.text)] == SUBTITLES
        web = await create(model="small", file=FILE, response_format="vtt")
        assert len(webvtt.from_string(web.text)) == 3
        assert (await create(model="small", file=FILE, response_format="text")).text == f"{TEXT}\n"


class TestRefusal:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        ("form", "param"),
        [
            ({"model": None}, "model"),
            ({"model": "text"}, "model"),
            ({"response_format": "diarized_json"}, "response_format"),
            ({"temperature": "1.1"}, "temperature"),
            ({"temperature": "-0.1"}, "temperature"),
            ({"temperature": "nan"}, "temperature"),
            ({"prompt": "x" * 32_001}, "prompt"),
            ({"vad": "maybe"}, "vad"),
            ({"frobnicate": "1"}, "frobnicate"),
        ],
    )
    async def test_wrong_field_is_named(
        self,
        client: httpx.AsyncClient,
        engine: Engine,
        runtime: FakeRuntime,
        path: str,
        form: dict[str, str | None],
        param: str,
    ) -> None:
        await self.is_refused(client, engine, runtime, path, form, param)

    @pytest.mark.parametrize(
        ("form", "param"),
        [
            ({"language": "x"}, "language"),
            ({"include[]": "logprobs"}, "include"),
            ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
            (
                {"response_format": "verbose_json", "timestamp_granularities[]": "letter"},
                "timestamp_granularities[0]",
            ),
            ({"stream": "true", "response_format": "srt"}, "stream"),
            ({"chunking_strategy": "never"}, "chunking_strategy"),
            ({"chunking_strategy[threshold]": "0.5"}, "chunking_strategy"),
            ({"keywords[]": "a", "hotwords": "b"}, "keywords"),
            ({"known_speaker_names[]": "a"}, "known_speaker_names"),
        ],
    )
    async def test_wrong_field_of_a_transcription_is_named(
        self,
        client: httpx.AsyncClient,
        engine: Engine,
        runtime: FakeRuntime,
        form: dict[str, str | None],
        param: str,
    ) -> None:
        await self.is_refused(client, engine, runtime, TRANSCRIPTIONS, form, param)

    async def test_translations_do_not_stream(
        self, client: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime
    ) -> None:
        form: dict[str, str | None] = {"stream": "true"}
        await self.is_refused(client, engine, runtime, TRANSLATIONS, form, "stream")

    async def is_refused(
        self,
        client: httpx.AsyncClient,
        engine: Engine,
        runtime: FakeRuntime,
        path: str,
        form: dict[str, str | None],
        param: str,
    ) -> None:
        fields = {k: v for k, v in {"model": "small", **form}.items() if v is not None}
        answer = await client.post(path, data=fields, files={"file": FILE})
        assert answer.status_code == 400
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param
        assert runtime.requests == []
        assert engine.status().ledger.granted_bytes == 0, "the model was loaded"

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        "files",
        [
            [("file", ("a.mp3", b""))],
            [("file", ("a.mp3", b"this is text"))],
            [("file", FILE), ("file", FILE)],
            [("other", FILE)],
        ],
    )
    async def test_wrong_upload(
        self, plain: httpx.AsyncClient, tmp_path: Path, path: str, files: list[Any]
    ) -> None:
        before = files_in(tmp_path / "data")
        answer = await plain.post(path, data={"model": "small"}, files=files)
        assert answer.status_code == 400
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == "file"
        assert files_in(tmp_path / "data") == before

    @pytest.mark.parametrize("path", PATHS)
    async def test_json_is_no_file(self, plain: httpx.AsyncClient, path: str) -> None:
        answer = await plain.post(path, json={"model": "small", "file": "AAAA"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")

    @pytest.mark.parametrize("path", PATHS)
    async def test_body_beyond_the_limit(self, plain: httpx.AsyncClient, path: str) -> None:
        files = {"file": ("a.wav", b"x" * 32 * 2**20)}
        answer = await plain.post(path, data={"model": "small"}, files=files)
        assert answer.status_code == 413
        assert conforms(answer.json(), "ErrorResponse")

    async def test_unknown_model(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.audio.transcriptions.create(model="smal", file=FILE)
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", ["false", "true"])
async def test_client_that_leaves_ends_the_run(
    url: str, engine: Engine, runtime: FakeRuntime, stream: str
) -> None:
    class Listening(Stuck):
        async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
            yield HEARD
            yield SEGMENTS[0]
            async for event in super().__call__(request):
                yield event

    stuck = runtime.answer = Listening()
    sent: dict[str, Any] = {"data": {"model": "small", "stream": stream}, "files": {"file": FILE}}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        call = asyncio.create_task(client.post(TRANSCRIPTIONS, **sent))
        await wait_for(stuck.began)
        assert engine.model_status("small").leases == 1
        call.cancel()
        await asyncio.wait([call])
    await wait_for(stuck.ended)
    runtime.answer = write_down
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        assert (await client.post(TRANSCRIPTIONS, **sent)).status_code == 200


@pytest.mark.parametrize(
    ("sent", "heard", "spoken"),
    [
        ("", None, None),
        ("auto", None, None),
        ("en-US", "en", "en-US"),
        ("zh_CN", "zh", "zh_CN"),
        ("English", "en", "en"),
        ("xx-YY", "xx-YY", "xx-YY"),
    ],
)
def test_languages_as_clients_send_them(sent: str, heard: str | None, spoken: str | None) -> None:
    assert TypeAdapter(HeardLanguage).validate_python(sent) == heard
    assert TypeAdapter(Language).validate_python(sent) == spoken
