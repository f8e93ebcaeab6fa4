"""Transcripts with speakers, over real sockets: two models of which the plan holds both or none."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, RuntimeFailed
from engine.events import Event, Progress, Speakers, SpeakerTurn, Word
from engine.requests import DiarizationRequest, Request, TranscriptionRequest
from engine.runtimes.base import Prepared
from tests.contract.openai import conforms
from tests.engine.recordings import RATE, encode, voice
from tests.server.fake import DEVICE_BYTES, MODEL_BYTES, FakeRuntime, fake_engine
from tests.server.test_audio import events_of
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for
from tests.server.test_transcriptions import FILE, HEARD, TRANSCRIPTIONS, segment

DIARIZED: dict[str, Any] = {"model": "small", "response_format": "diarized_json"}
TURNS = (SpeakerTurn(0.0, 2.0, "A"), SpeakerTurn(2.0, 3726.0, "anna"))
SEGMENTS = (
    segment(0, 0.0, 1.5, " Hello there.", Word(" Hello", 0.0, 0.5), Word(" there.", 0.5, 1.5)),
    segment(1, 2.0, 3.5, " Hi. Who", Word(" Hi.", 2.0, 3.0), Word(" Who", 3.0, 3.5)),
    segment(2, 3.5, 4.0, " is it?", Word(" is", 3.5, 3.7), Word(" it?", 3.7, 4.0)),
)
SAID = [
    {"id": "seg_001", "start": 0.0, "end": 1.5, "text": "Hello there.", "speaker": "A"},
    {"id": "seg_002", "start": 2.0, "end": 4.0, "text": "Hi. Who is it?", "speaker": "anna"},
]
TEXT = "Hello there. Hi. Who is it?"


class Answers:
    """What both models give. Each test may replace either."""

    def __init__(self) -> None:
        self.transcript: Any = self.write
        self.turns: Any = self.tell_apart

    def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
        diarizes = isinstance(request, DiarizationRequest)
        found: AsyncGenerator[Event, None] = (self.turns if diarizes else self.transcript)(request)
        return found

    @staticmethod
    async def write(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
        yield HEARD
        for each in SEGMENTS:
            yield each

    @staticmethod
    async def tell_apart(request: DiarizationRequest) -> AsyncGenerator[Event, None]:
        yield Progress(0.5)
        yield Speakers(HEARD.duration_s, TURNS)


class ListeningRuntime(FakeRuntime):
    tasks = ("transcribe", "diarize")
    knows_words = True

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if isinstance(request, TranscriptionRequest) and request.temperature:
            raise InvalidRequest("It is not in the mood.", param="temperature")
        if (
            isinstance(request, TranscriptionRequest)
            and request.word_times
            and not self.knows_words
        ):
            raise InvalidRequest("It does not know.", param="timestamp_granularities")
        return super().prepare(model, request)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def runtime(answers: Answers) -> FakeRuntime:
    runtime = ListeningRuntime()
    runtime.answer = answers
    return runtime


MODELS = (
    {"id": "small", "aliases": ["gpt-4o-transcribe-diarize"], "task": "transcribe"},
    {
        "id": "speakers",
        "task": "diarize",
        "source": "starter:none",
        "options": {"nbytes": 4 * MODEL_BYTES},
    },
    {"id": "large", "task": "transcribe", "options": {"nbytes": DEVICE_BYTES - MODEL_BYTES}},
)


def engine_of(runtime: FakeRuntime, folder: Path, ids: str) -> Engine:
    models = [
        {"source": "none", "runtime": "fake", **each}
        for each in MODELS
        if each["id"] in ids.split()
    ]
    return fake_engine(runtime, folder, models=models)


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return engine_of(runtime, tmp_path, "small speakers large")


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture
async def plain(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


def reference(seconds: float, kind: str = "wav", level: float = 1.0) -> str:
    data = encode(level * np.resize(voice(2), int(seconds * RATE)).astype(np.float32), kind)
    return f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"


def is_at_rest(engine: Engine) -> bool:
    """Nothing runs, and no model is kept."""
    return all((each.leases, each.holds) == (0, 0) for each in engine.status().models)


async def test_who_said_what(
    sdk: openai.AsyncOpenAI, engine: Engine, runtime: FakeRuntime, answers: Answers
) -> None:
    held: list[tuple[int, ...]] = []

    async def look(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
        held.append(tuple(engine.model_status(name).holds for name in ("small", "speakers")))
        async for event in Answers.write(request):
            yield event

    answers.transcript = look
    raw = await sdk.audio.transcriptions.with_raw_response.create(
        model="gpt-4o-transcribe-diarize",
        file=FILE,
        response_format="diarized_json",
        chunking_strategy="auto",
        extra_body={
            "known_speaker_names": ["anna", "ben"],
            "known_speaker_references": [reference(2), reference(9.9, "mp3")],
        },
    )
    document = json.loads(raw.content)
    assert conforms(document, "CreateTranscriptionResponseDiarizedJson")
    assert document == {
        "task": "transcribe",
        "duration": HEARD.duration_s,
        "text": TEXT,
        "segments": [{"type": "transcript.text.segment", **each} for each in SAID],
        "usage": {"type": "duration", "seconds": HEARD.duration_s},
    }
    parsed: Any = raw.parse()
    assert [each.speaker for each in parsed.segments] == ["A", "anna"]
    assert raw.headers["x-roundhouse-served-by"] == "small"
    # The wait was that of both, before the transcription began.
    assert raw.headers["x-roundhouse-tier"] == "disk"
    assert float(raw.headers["x-roundhouse-load-ms"]) > 0
    assert raw.headers["x-roundhouse-weights"] == "random"  # those that tell the speakers apart
    assert held == [(1, 1)] and is_at_rest(engine)
    (diarized,) = (each for each in runtime.requests if isinstance(each, DiarizationRequest))
    (heard,) = (each for each in runtime.requests if isinstance(each, TranscriptionRequest))
    assert (diarized.model, diarized.audio, heard.word_times) == ("speakers", FILE[1], True)
    assert [each.name for each in diarized.known_speakers] == ["anna", "ben"]
    lengths = [len(each.samples) / RATE for each in diarized.known_speakers]
    assert lengths == [pytest.approx(2), pytest.approx(9.9, abs=0.1)]


async def test_a_model_that_knows_no_words_is_asked_for_segments(
    plain: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    assert isinstance(runtime, ListeningRuntime)
    runtime.knows_words = False
    answer = await plain.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE})
    assert answer.status_code == 200
    assert [each.word_times for each in runtime.requests if hasattr(each, "word_times")] == [False]


async def test_events_are_the_text_then_the_speakers_then_the_whole(
    sdk: openai.AsyncOpenAI, plain: httpx.AsyncClient, engine: Engine, answers: Answers
) -> None:
    may_end = asyncio.Event()

    async def late(request: DiarizationRequest) -> AsyncGenerator[Event, None]:
        yield Progress(0.1)
        await may_end.wait()
        yield Speakers(HEARD.duration_s, TURNS)

    answers.turns = late
    stream = await sdk.audio.transcriptions.create(
        file=FILE, model="small", response_format="diarized_json", stream=True
    )
    kinds = []
    async for event in stream:
        kinds.append(event.type)
        if len(kinds) == len(SEGMENTS):  # text does not wait for the speakers
            may_end.set()
    deltas, spoken = ["transcript.text.delta"] * 3, ["transcript.text.segment"] * 2
    assert kinds == [*deltas, *spoken, "transcript.text.done"]
    answer = await plain.post(
        TRANSCRIPTIONS, data={**DIARIZED, "stream": "true"}, files={"file": FILE}
    )
    events = events_of(answer.text)
    assert all(conforms(each, "CreateTranscriptionResponseStreamEvent") for each in events)
    assert events[3:] == [
        *({"type": "transcript.text.segment", **each} for each in SAID),
        {"type": "transcript.text.done", "text": TEXT},
    ]
    assert is_at_rest(engine)


REFERENCES = {"known_speaker_names[]": ["a"], "known_speaker_references[]": [reference(3)]}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"response_format": "json", **REFERENCES}, "known_speaker_names"),
        ({"known_speaker_names[]": ["a"]}, "known_speaker_references"),
        ({"known_speaker_references[]": [reference(3)]}, "known_speaker_references"),
        ({"known_speaker_names[]": ["a", "a"]}, "known_speaker_names"),
        ({"known_speaker_names[]": list("abcde")}, "known_speaker_names"),
        *(
            ({**REFERENCES, "known_speaker_references[]": [each]}, "known_speaker_references[0]")
            for each in (
                "http://a/b",
                "data:audio/wav;base64,!",
                "data:audio/wav;base64,",
                "data:audio/wav;base64,AAAA",
                reference(1.9),
                reference(10.5),
                reference(3, level=0),
            )
        ),
        ({"timestamp_granularities[]": ["word"]}, "timestamp_granularities"),
        ({"temperature": "0.5"}, "temperature"),
    ],
)
async def test_a_wrong_field_is_named_before_anything_is_loaded(
    plain: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime, form: Any, param: str
) -> None:
    answer = await plain.post(TRANSCRIPTIONS, data={**DIARIZED, **form}, files={"file": FILE})
    assert answer.status_code == 400, answer.text
    assert conforms(answer.json(), "ErrorResponse")
    assert answer.json()["error"]["param"] == param
    assert runtime.requests == [] and engine.status().ledger.granted_bytes == 0


class TestWithoutADiarizer:
    @pytest.fixture
    def engine(self, runtime: FakeRuntime, tmp_path: Path) -> Engine:
        return engine_of(runtime, tmp_path, "small")

    async def test_the_refusal_says_what_to_configure(
        self, plain: httpx.AsyncClient, engine: Engine
    ) -> None:
        answer = await plain.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "response_format")
        assert "task diarize" in error["message"]
        assert engine.status().ledger.granted_bytes == 0


async def test_models_that_do_not_fit_together_are_refused_and_none_is_loaded(
    plain: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime
) -> None:
    form = {**DIARIZED, "model": "large"}
    answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
    assert answer.status_code == 507
    assert runtime.requests == [] and engine.status().ledger.granted_bytes == 0
    assert is_at_rest(engine)


async def test_a_session_that_leaves_no_room_is_told_and_waits_for_nobody(
    plain: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime
) -> None:
    await engine.load("large")
    with await engine.hold(["large"], request_id="a"):
        answer = await plain.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE})
        assert answer.status_code == 503 and "retry-after" in answer.headers
    assert runtime.requests == []
    answer = await plain.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE})
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("which", ["transcript", "turns", "no turns", "at once"])
async def test_a_failure_of_either_lets_both_go(
    plain: httpx.AsyncClient, engine: Engine, answers: Answers, stream: str, which: str
) -> None:
    async def fail(request: Any) -> AsyncGenerator[Event, None]:
        if which != "at once":
            yield Progress(0.5) if isinstance(request, DiarizationRequest) else HEARD
        if which != "no turns":
            raise RuntimeFailed("out of breath")

    if which == "transcript":
        answers.transcript = fail
    else:
        answers.turns = fail
    form = {**DIARIZED, "stream": stream}
    answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
    begun = stream == "true" and which in ("turns", "no turns")
    assert answer.status_code == (200 if begun else 500)
    expected = "told no speakers apart" if which == "no turns" else "out of breath"
    assert expected in answer.text and "transcript.text.done" not in answer.text
    assert is_at_rest(engine)
    answers.transcript, answers.turns = Answers.write, Answers.tell_apart
    answer = await plain.post(TRANSCRIPTIONS, data=form, files={"file": FILE})
    assert answer.status_code == 200


async def test_a_client_that_leaves_ends_both_runs(
    url: str, engine: Engine, answers: Answers
) -> None:
    class Listening(Stuck):
        async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
            yield Progress(0.5) if isinstance(request, DiarizationRequest) else HEARD
            async for event in super().__call__(request):
                yield event

    turns = answers.turns = Listening()
    transcript = answers.transcript = Listening()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        call = asyncio.create_task(client.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE}))
        await wait_for(turns.began)
        await wait_for(transcript.began)
        call.cancel()
        await asyncio.wait([call])
    await wait_for(turns.ended)
    await wait_for(transcript.ended)
    answers.transcript, answers.turns = Answers.write, Answers.tell_apart
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        answer = await client.post(TRANSCRIPTIONS, data=DIARIZED, files={"file": FILE})
        assert answer.status_code == 200
    assert is_at_rest(engine)


async def test_a_request_for_loaded_models_only_takes_both(
    plain: httpx.AsyncClient, engine: Engine
) -> None:
    await engine.load("small")
    only = {"x-roundhouse-if-loaded-only": "true"}
    sent: dict[str, Any] = {"data": DIARIZED, "files": {"file": FILE}, "headers": only}
    answer = await plain.post(TRANSCRIPTIONS, **sent)
    assert answer.status_code == 409 and "speakers" in answer.text
    await engine.load("speakers")
    assert (await plain.post(TRANSCRIPTIONS, **sent)).status_code == 200


async def test_the_timeout_of_a_request_bounds_the_wait_for_both(
    plain: httpx.AsyncClient, engine: Engine, answers: Answers
) -> None:
    class Listening(Stuck):
        async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
            yield HEARD
            async for event in super().__call__(request):
                yield event

    answers.transcript = Listening()
    request = TranscriptionRequest(model="large", audio=FILE[1], request_id="a")
    session = await engine.open(request)
    sent: dict[str, Any] = {"data": DIARIZED, "files": {"file": FILE}}
    answer = await plain.post(TRANSCRIPTIONS, **sent, headers={"x-roundhouse-timeout": "0.05"})
    assert answer.status_code == 503 and "not served within" in answer.text
    await session.close()
    assert is_at_rest(engine)
