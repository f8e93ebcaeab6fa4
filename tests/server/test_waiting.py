"""What a stream tells while its request waits, over real sockets and by the official clients."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import Message

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, LoadFailed
from engine.events import Document, Event, Frame, Heard, ImageResult, Segment, Speech
from engine.requests import ImageRequest, SpeechRequest, TextOperation, TranscriptionRequest
from engine.runtimes.base import LoadedModel
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening

pytestmark = pytest.mark.slow  # thirteen seconds: they wait for comments of a stream

CHAT = "/v1/chat/completions"
TIMEOUT_S = 60
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
RECORDING = ("a.wav", b"RIFF", "audio/wav")
CHUNK = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "small",
    "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}],
}
SEGMENT = Segment(0, 0.0, 1.0, " Hello.", 0, (1,), 0.0, -0.1, 1.0, 0.0)


async def answer(request: Any) -> AsyncGenerator[Event, None]:
    """Something short for every kind of request."""
    if isinstance(request, ImageRequest):
        yield ImageResult((Image.new("RGB", (8, 8)),), seed=1)
    elif isinstance(request, SpeechRequest):
        yield Speech(np.zeros(2400, np.float32), 24_000)
    elif isinstance(request, TranscriptionRequest):
        yield Heard("en", 1.0)
        yield SEGMENT
    elif request.operation is TextOperation.MESSAGES:
        yield Frame('event: message_stop\ndata: {"type": "message_stop"}\n\n')
    else:
        yield Frame(f"data: {json.dumps(CHUNK)}\n\n")
        yield Frame("data: [DONE]\n\n")


class Loading(FakeRuntime):
    """Loads only when the test lets it, and then fails if the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = answer
        self.may_load = asyncio.Event()
        self.error: LoadFailed | None = None

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        await self.may_load.wait()
        if self.error is not None:
            raise self.error
        return await super().load(model, on_failure)


@pytest.fixture
def runtime() -> Loading:
    return Loading()


@pytest.fixture
def engine(runtime: Loading, tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits tells so almost at once, and then only once."""
    monkeypatch.setattr("server.answer.GRACE_S", 0.01)
    monkeypatch.setattr("server.answer.PROGRESS_INTERVAL_S", 3600.0)


@pytest.fixture
async def http(url: str, runtime: Loading) -> AsyncIterator[httpx.AsyncClient]:
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(base_url=url, timeout=60) as client:
        while (await client.get("/ready")).status_code != 200:
            pass
        yield client
    runtime.may_load.set()  # the engine stops only when the load has ended


@pytest.fixture
async def sdk(http: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{http.base_url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def claude(http: httpx.AsyncClient) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=str(http.base_url), api_key="none", max_retries=0
    ) as client:
        yield client


def chat(model: str = "small", **extra: object) -> dict[str, object]:
    return {"model": model, "messages": HELLO, "stream": True, **extra}


async def test_a_load_is_told_until_it_ends(
    http: httpx.AsyncClient, runtime: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.answer.PROGRESS_INTERVAL_S", 0.01)
    async with http.stream("POST", CHAT, json=chat()) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "x-roundhouse-tier" not in response.headers, "it cannot be known yet"
        text = ""
        async for piece in response.aiter_text():
            text += piece
            if text.count(": loading small eta=") == 2:
                runtime.may_load.set()
    *comments, granted, first, last, end = text.split("\n\n")
    # Before the load is decided it is queued, and once granted it runs, each for a moment.
    told = r": (queued position=1( eta=\d+\.\ds)?|loading small eta=\d+\.\ds|running small)"
    assert [comment for comment in comments if not re.fullmatch(told, comment)] == []
    assert re.fullmatch(
        r": granted queue-ms=\d+\.\d load-ms=\d+\.\d run-ms=\d+\.\d tier=disk served-by=small",
        granted,
    )
    assert json.loads(first.removeprefix("data: ")) == CHUNK
    assert (last, end) == ("data: [DONE]", "")


async def test_the_queue_is_told(http: httpx.AsyncClient, runtime: Loading) -> None:
    """`other` waits behind the load of `small`; its own cannot begin before."""
    async with http.stream("POST", CHAT, json=chat()) as first:
        assert first.status_code == 200
        async with http.stream("POST", CHAT, json=chat("other")) as second:
            comments = second.aiter_text()
            assert re.fullmatch(r": queued position=2( eta=\d+\.\ds)?\n\n", await anext(comments))
            runtime.may_load.set()
            assert "[DONE]" in "".join([piece async for piece in comments])


async def test_it_is_told_no_oftener_than_it_should(
    http: httpx.AsyncClient, runtime: Loading
) -> None:
    async with http.stream("POST", CHAT, json=chat()) as response:
        pieces = response.aiter_text()
        text = await anext(pieces)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(pieces)
    assert text.count(": loading") == 1


async def test_what_is_granted_in_time_keeps_its_status(
    http: httpx.AsyncClient, runtime: Loading
) -> None:
    """Only waiting for the grant begins the response; the model may still refuse."""
    runtime.may_load.set()
    ran, may_fail = asyncio.Event(), asyncio.Event()

    async def refuses(_: Any) -> AsyncGenerator[Event, None]:
        ran.set()
        await may_fail.wait()
        raise InvalidRequest("The prompt is too long.", param="messages")
        yield

    await http.post(CHAT, json=chat())
    runtime.answer = refuses
    call = asyncio.create_task(http.post(CHAT, json=chat()))
    await ran.wait()
    for _ in range(20):  # each takes longer than the grace
        await http.get("/v1/engine")
    may_fail.set()
    response = await call
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


async def test_a_failure_within_the_grace_keeps_its_status(
    http: httpx.AsyncClient, runtime: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.answer.GRACE_S", 3600.0)
    response = await http.post(CHAT, json=chat(timeout=0.05))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
    runtime.error = LoadFailed("the file is torn")
    runtime.may_load.set()
    assert (await http.post(CHAT, json=chat())).status_code == 500


async def test_what_is_no_stream_is_not_begun(http: httpx.AsyncClient, runtime: Loading) -> None:
    for body in (chat(stream=False, timeout=0.1), {"model": "small", "timeout": 0.1}):
        assert (await http.post(CHAT, json=body)).status_code == 503
    speech = {"model": "small", "input": "a", "timeout": 0.1}
    assert (await http.post("/v1/audio/speech", json=speech)).status_code == 503


async def test_a_whole_document_after_comments_is_an_event(
    http: httpx.AsyncClient, runtime: Loading
) -> None:
    async def document(_: Any) -> AsyncGenerator[Event, None]:
        yield Document(json.dumps(CHUNK).encode())

    runtime.answer = document
    async with http.stream("POST", CHAT, json=chat()) as response:
        text = ""
        async for piece in response.aiter_text():
            text += piece
            runtime.may_load.set()
    *_, event, end = text.split("\n\n")
    assert json.loads(event.removeprefix("data: ")) == CHUNK
    assert end == ""


async def test_client_leaves_while_it_is_told(
    http: httpx.AsyncClient, engine: Engine, runtime: Loading
) -> None:
    async with http.stream("POST", CHAT, json=chat()) as response:
        assert (await anext(response.aiter_text())).startswith(": loading")
        assert engine.status().queue
    while engine.status().queue:
        await http.get("/v1/engine")
    runtime.may_load.set()
    assert "[DONE]" in (await http.post(CHAT, json=chat())).text
    assert len(runtime.requests) == 1


async def test_client_leaves_while_nothing_gets_through_to_it(
    http: httpx.AsyncClient, app: FastAPI, engine: Engine
) -> None:
    sending = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(chat()).encode(), "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await sending.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sending.set()
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    assert engine.status().queue == ()


class TestClients:
    """`create` returns when the response begins: with a comment, as nothing is loaded by then."""

    async def test_chat(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.chat.completions.create(model="small", messages=HELLO, stream=True)
        runtime.may_load.set()
        assert [chunk.choices[0].delta.content async for chunk in stream] == ["hi"]

    async def test_images(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.images.generate(model="small", prompt="a", stream=True)
        runtime.may_load.set()
        assert [event.type async for event in stream] == ["image_generation.completed"]

    async def test_transcription(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.audio.transcriptions.create(model="small", file=RECORDING, stream=True)
        runtime.may_load.set()
        assert [event.type async for event in stream] == [
            "transcript.text.delta",
            "transcript.text.done",
        ]

    async def test_speech(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        async with sdk.audio.speech.with_streaming_response.create(
            model="small", voice="alloy", input="a", stream_format="sse", response_format="wav"
        ) as response:
            runtime.may_load.set()
            # The client has no reader of these events; its own decoder is what its users take.
            decoder = response.http_response.aiter_bytes()
            events = [
                event.json()["type"]
                async for event in openai._streaming.SSEDecoder().aiter_bytes(decoder)
            ]
        assert set(events) == {"speech.audio.delta", "speech.audio.done"}

    async def test_anthropic(self, claude: anthropic.AsyncAnthropic, runtime: Loading) -> None:
        stream = await claude.messages.create(
            model="small", max_tokens=1, messages=HELLO, stream=True
        )
        runtime.may_load.set()
        assert [event.type async for event in stream] == ["message_stop"]


class TestFailures:
    """After the response began, the stream itself tells; the clients raise."""

    @pytest.fixture(autouse=True)
    def torn(self, runtime: Loading) -> None:
        runtime.error = LoadFailed("the file is torn")

    async def test_chat(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.chat.completions.create(model="small", messages=HELLO, stream=True)
        runtime.may_load.set()
        with pytest.raises(openai.APIError, match="the file is torn") as caught:
            [chunk async for chunk in stream]
        assert caught.value.code == "model_load_failed"

    async def test_images(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.images.generate(model="small", prompt="a", stream=True)
        runtime.may_load.set()
        with pytest.raises(openai.APIError, match="the file is torn") as caught:
            [event async for event in stream]
        assert caught.value.code == "model_load_failed"

    async def test_transcription(self, sdk: openai.AsyncOpenAI, runtime: Loading) -> None:
        stream = await sdk.audio.transcriptions.create(model="small", file=RECORDING, stream=True)
        runtime.may_load.set()
        with pytest.raises(openai.APIError, match="the file is torn"):
            [event async for event in stream]

    async def test_anthropic(self, claude: anthropic.AsyncAnthropic, runtime: Loading) -> None:
        stream = await claude.messages.create(
            model="small", max_tokens=1, messages=HELLO, stream=True
        )
        runtime.may_load.set()
        with pytest.raises(anthropic.APIStatusError, match="the file is torn"):
            [event async for event in stream]

    async def test_timeout(self, sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.chat.completions.create(
            model="small", messages=HELLO, stream=True, extra_body={"timeout": 0.1}
        )
        with pytest.raises(openai.APIError) as caught:
            [chunk async for chunk in stream]
        assert caught.value.code == "queue_timeout"

    async def test_envelope(self, http: httpx.AsyncClient, runtime: Loading) -> None:
        body = {"model": "small", "input": "a", "stream_format": "sse"}
        async with http.stream("POST", "/v1/audio/speech", json=body) as response:
            runtime.may_load.set()
            text = "".join([piece async for piece in response.aiter_text()])
        comment, event, end = text.split("\n\n")
        assert comment.startswith(": loading small")
        name, data = event.split("\n")
        assert (name, end) == ("event: error", "")
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "model_load_failed"


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (CHAT, {"json": {"model": "small", "messages": HELLO}}),
        ("/v1/messages", {"json": {"model": "small", "messages": HELLO}}),
        ("/v1/images/generations", {"json": {"model": "small", "prompt": "a"}}),
        ("/v1/audio/speech", {"json": {"model": "small", "input": "a"}}),
        (
            "/v1/audio/transcriptions",
            {"data": {"model": "small"}, "files": {"file": RECORDING}},
        ),
    ],
)
async def test_whoever_waits_too_long_is_told_when_to_come_again(
    http: httpx.AsyncClient, runtime: Loading, path: str, sent: dict[str, Any]
) -> None:
    response = await http.post(path, **sent, headers={"x-roundhouse-timeout": "0.05"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert runtime.requests == []


async def test_the_start_is_told(tmp_path: Path) -> None:
    runtime = Loading()
    runtime.may_load.set()
    runtime.may_start.clear()
    app = create_app(fake_engine(runtime, tmp_path), ServerSettings())
    async with (
        asyncio.timeout(TIMEOUT_S),
        listening(app) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json=chat()) as response,
    ):
        pieces = response.aiter_text()
        assert await anext(pieces) == ": starting\n\n"
        runtime.may_start.set()
        assert "[DONE]" in "".join([piece async for piece in pieces])
