"""Two Roundhouses, one behind the other: the first asks the second for everything."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import wave
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import SecretStr

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.events import Document, Event, Frame, Heard, ImageResult, Segment, Speech
from engine.requests import (
    ImageRequest,
    SpeechRequest,
    TextOperation,
    TextRequest,
    TranscriptionRequest,
)
from engine.runtimes.base import Runtime
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import DEVICE_BYTES, FakeDevice, FakeRuntime, fake_engine, listening
from tests.server.test_audio import PIECES, RATE
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for

KEY = "sk-the-key-of-the-second"
CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]

CHUNK = '{"id":"c","object":"chat.completion.chunk","created":1,"model":"small","choices":[%s]%s}'
WORDS = [f'{{"index":0,"delta":{{"content":"{word}"}},"finish_reason":null}}' for word in "abc"]
STOP = '{"index":0,"delta":{},"finish_reason":"stop"}'
COUNTS = ',"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}'


async def answer(request: Any) -> AsyncGenerator[Event, None]:
    """What the second one has for each kind of request."""
    match request:
        case TextRequest(operation=TextOperation.CHAT) if request.body.get("stream"):
            for choice in (*WORDS, STOP):
                yield Frame(f"data: {CHUNK % (choice, '')}\n\n")
            if request.body.get("stream_options"):
                yield Frame(f"data: {CHUNK % ('', COUNTS)}\n\n")
            yield Frame("data: [DONE]\n\n")
        case TextRequest(operation=TextOperation.CHAT):
            text = '{"index":0,"message":{"role":"assistant","content":"abc"}}'
            yield Document((CHUNK % (text, COUNTS)).encode())
        case TextRequest(operation=TextOperation.EMBEDDINGS):
            yield Document(b'{"model":"small","data":[{"embedding":[1.5]}],"usage":{}}')
        case TextRequest(operation=TextOperation.MESSAGES):
            yield Document(
                b'{"id":"msg_1","type":"message","role":"assistant","model":"small","content":'
                b'[{"type":"text","text":"abc"}],"usage":{"input_tokens":7,"output_tokens":3}}'
            )
        case TextRequest():
            yield Document(b'{"model":"small","object":"response","output":[]}')
        case ImageRequest():
            size = (request.width or 8, request.height or 8)
            colour = "red" if not request.images else "blue"
            yield ImageResult((Image.new("RGB", size, colour),) * request.n, request.seed or 5)
        case SpeechRequest():
            for piece in PIECES:
                yield Speech(piece, RATE)
        case TranscriptionRequest():
            yield Heard("en", 3.0)
            yield Segment(0, 0.0, 1.5, " Hello.", 0, (1,), 0.0, -0.1, 1.0, 0.2)
            yield Segment(1, 1.5, 3.0, " Bye.", 0, (2,), 0.0, -0.1, 1.0, 0.2)


async def refuse(request: Any) -> AsyncGenerator[Event, None]:
    raise InvalidRequest("Too bright.", param="prompt", status=422)
    yield


def first_engine(second: str, state_dir: Path) -> Engine:
    """An engine whose models are all of the second server."""
    models = [
        {
            "id": task,
            "runtime": "remote",
            "task": task,
            "source": f"{second}/v1",
            "options": {
                "model": "small",
                "api_key": KEY,
                "provider": "second",
                "apis": ["chat", "completions", "responses", "embeddings", "messages"],
                "extra_fields": ["seed"],
            },
        }
        for task in ("generate", "embed", "image", "speech", "transcribe")
    ]
    raw = {
        "memory": DEVICE_BYTES,
        "state_dir": state_dir,
        "data_dir": state_dir / "data",
        "models": [*models, {"id": "local", "runtime": "fake", "source": "none"}],
    }
    return Engine(EngineConfig.model_validate(raw), device=FakeDevice())


@pytest.fixture
def runtime() -> FakeRuntime:
    """Of the second server."""
    runtime = FakeRuntime()
    runtime.answer = answer
    return runtime


@pytest.fixture
async def first(runtime: FakeRuntime, tmp_path: Path) -> AsyncIterator[tuple[Engine, str]]:
    settings = ServerSettings(api_keys=(SecretStr(KEY),))
    behind = create_app(fake_engine(runtime, tmp_path / "second"), settings)
    async with listening(behind) as second:
        engine = first_engine(second, tmp_path / "first")
        async with listening(create_app(engine, ServerSettings())) as url:
            yield engine, url


@pytest.fixture
async def sdk(first: tuple[Engine, str]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{first[1]}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_text(sdk: openai.AsyncOpenAI, first: tuple[Engine, str]) -> None:
    whole = await sdk.chat.completions.create(model="generate", messages=MESSAGES)
    assert whole.model == "generate" and whole.choices[0].message.content == "abc"
    assert whole.usage is not None and whole.usage.total_tokens == 10
    embedding = await sdk.embeddings.create(model="embed", input="a", encoding_format="float")
    assert embedding.model == "embed" and embedding.data[0].embedding == [1.5]
    response = await sdk.responses.create(model="generate", input="a")
    assert response.model == "generate"
    async with anthropic.AsyncAnthropic(base_url=first[1], api_key="none") as client:
        message = await client.messages.create(
            model="generate", max_tokens=8, messages=[{"role": "user", "content": "Hello"}]
        )
    assert message.model == "generate" and message.usage.output_tokens == 3


@pytest.mark.parametrize("counts", [True, False])
async def test_a_stream_is_unbroken(
    first: tuple[Engine, str], counts: bool, runtime: FakeRuntime
) -> None:
    body: dict[str, Any] = {"model": "generate", "messages": MESSAGES, "stream": True}
    if counts:
        body["stream_options"] = {"include_usage": True}
    async with httpx.AsyncClient(base_url=first[1]) as client:
        got = await client.post(CHAT, json=body)
    chunks = [CHUNK % (choice, "") for choice in (*WORDS, STOP)]
    chunks += [CHUNK % ("", COUNTS)] if counts else []
    expected = [*(each.replace('"small"', '"generate"') for each in chunks), "[DONE]"]
    assert got.text == "".join(f"data: {each}\n\n" for each in expected)
    assert got.headers["content-type"].startswith("text/event-stream")


async def test_images(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.images.generate(
        model="image", prompt="a train", n=2, size="1024x1024", extra_body={"seed": 9}
    )
    assert made.data is not None and len(made.data) == 2
    assert made.model_dump()["seed"] == 9
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, "PNG")
    edited = await sdk.images.edit(model="image", prompt="blue", image=buffer.getvalue())
    assert edited.data is not None
    (picture,) = edited.data
    assert picture.b64_json is not None
    image = Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))
    assert image.getpixel((0, 0)) == (0, 0, 255), "the second server got the picture"


async def test_speech(sdk: openai.AsyncOpenAI) -> None:
    spoken = await sdk.audio.speech.create(
        model="speech", input="Hello", voice="alloy", response_format="wav"
    )
    raw = spoken.content
    # The header of a stream cannot know its length.
    with wave.open(io.BytesIO(raw[:40] + (len(raw) - 44).to_bytes(4, "little") + raw[44:])) as file:
        assert file.getframerate() == RATE
        samples = np.frombuffer(file.readframes(10**7), "<i2") / 32768
    expected = np.concatenate(PIECES)
    assert len(samples) == len(expected)
    np.testing.assert_allclose(samples, expected, atol=2 / 32768)


async def test_transcription(sdk: openai.AsyncOpenAI, first: tuple[Engine, str]) -> None:
    told = await sdk.audio.transcriptions.create(
        model="transcribe", file=("a.wav", b"RIFF"), response_format="verbose_json"
    )
    assert told.text == "Hello. Bye." and told.language == "english"
    assert told.segments is not None and [each.end for each in told.segments] == [1.5, 3.0]
    async with httpx.AsyncClient(base_url=first[1]) as client:
        translated = await client.post(
            "/v1/audio/translations", data={"model": "transcribe"}, files={"file": b"RIFF"}
        )
    assert translated.json()["text"] == "Hello. Bye."


async def test_a_client_that_leaves_stops_the_second(
    first: tuple[Engine, str], runtime: FakeRuntime
) -> None:
    engine, url = first
    runtime.answer = stuck = Stuck(f"data: {CHUNK % (WORDS[0], '')}\n\n")
    body = {"model": "generate", "messages": MESSAGES, "stream": True}
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        async for _ in response.aiter_bytes():
            break
    await wait_for(stuck.ended)
    assert engine.model_status("generate").leases == 0


async def test_errors_of_the_second_reach_the_client(
    first: tuple[Engine, str], sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    runtime.answer = refuse
    with pytest.raises(openai.UnprocessableEntityError, match="Too bright") as raised:
        await sdk.images.generate(model="image", prompt="x")
    assert raised.value.param == "prompt"
    async with httpx.AsyncClient(base_url=first[1]) as client:
        refused = await client.post("/tokenize", json={"model": "generate", "prompt": "a"})
    assert refused.status_code == 400 and "does not support tokenize" in refused.text


async def test_remote_models_are_there_from_the_start_and_stay(
    first: tuple[Engine, str], runtime: FakeRuntime
) -> None:
    engine, url = first
    await engine.plan("generate")  # it has started
    states = {each.id: (each.state.value, each.device_bytes) for each in engine.status().models}
    assert states["generate"] == ("resident", 0) and states["local"] == ("absent", 0)
    async with httpx.AsyncClient(base_url=url) as client:
        plan = (await client.post("/v1/engine/plan", json={"model": "generate"})).json()
    assert plan["wanted_bytes"] == 0 and plan["evictions"] == [] and plan["eta_s"] == 0


async def test_a_remote_model_does_not_wait_for_the_transition_of_another(
    first: tuple[Engine, str], sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = first
    # The second server loads its model for this, and has it then.
    await sdk.embeddings.create(model="embed", input="a", encoding_format="float")
    may_load, loading = asyncio.Event(), asyncio.Event()
    load = FakeRuntime.load

    async def slow(self: Any, model: Any, on_failure: Any) -> Any:
        loading.set()
        await may_load.wait()
        return await load(self, model, on_failure)

    monkeypatch.setattr(FakeRuntime, "load", slow)
    local = asyncio.create_task(engine.load("local"))
    async with asyncio.timeout(TIMEOUT_S):
        await loading.wait()
        await sdk.embeddings.create(model="embed", input="a", encoding_format="float")
        may_load.set()
        await local


async def test_health_metrics_and_no_key_anywhere(
    first: tuple[Engine, str],
    sdk: openai.AsyncOpenAI,
    runtime: FakeRuntime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    engine, url = first
    await sdk.chat.completions.create(model="generate", messages=MESSAGES)
    runtime.answer = refuse
    with pytest.raises(openai.UnprocessableEntityError):
        await sdk.images.generate(model="image", prompt="x")
    async with httpx.AsyncClient(base_url=url) as client:
        paths = ("/health/providers", "/metrics", "/v1/engine", "/v1/models", "/openapi.json")
        pages = [(await client.get(path)).text for path in (*paths, "/v1/engine/events?stream=0")]
        (provider,) = (await client.get("/health/providers")).json()["data"]
    assert provider["provider"] == "second" and provider["breaker"] == "closed"
    assert provider["error_rate"] == 0.0 and provider["first_byte_p95_s"] > 0
    assert [each["model"] for each in provider["models"]] == [
        "generate", "embed", "image", "speech", "transcribe",
    ]  # fmt: skip
    assert 'roundhouse_provider_requests_total{outcome="ok",provider="second"} 1.0' in pages[1]
    assert 'roundhouse_provider_breaker{provider="second",state="closed"} 1.0' in pages[1]
    texts = [*pages, caplog.text, repr(engine.config), str(engine.config)]
    assert not [text for text in texts if KEY in text]


def test_only_remote_models_take_no_device() -> None:
    assert not Runtime.takes_no_device
