"""The official clients, over real sockets: what their users catch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import anthropic
import openai
import pytest
from pydantic import SecretStr

from engine.errors import RuntimeFailed
from engine.events import Document, Event, Frame
from engine.requests import TextRequest
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(api_keys=(SecretStr("user-key"),))


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="user-key", max_retries=2
    ) as client:
        yield client


@pytest.fixture
async def claude(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="user-key", max_retries=0) as client:
        yield client


async def chat(client: openai.AsyncOpenAI, model: str = "small", **extra: object) -> object:
    return await client.post(
        "/chat/completions",
        cast_to=object,
        body={"model": model, "messages": HELLO, **extra},
    )


async def test_models(client: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in await client.models.list()]
    assert "gpt-4o" in names
    assert (await client.models.retrieve("org/small")).id == "org/small"


async def test_chat_completion(client: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Document(
            b'{"id": "c", "object": "chat.completion", "created": 1, "model": "small", "choices":'
            b' [{"index": 0, "finish_reason": "stop",'
            b' "message": {"role": "assistant", "content": "hi"}}]}'
        )

    runtime.answer = answer
    completion = await client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}]
    )
    assert completion.choices[0].message.content == "hi"
    assert completion._request_id == runtime.requests[0].request_id


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await chat(client, "smal")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "small" in caught.value.message


async def test_bad_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/chat/completions", cast_to=object, body={"messages": HELLO})
    assert caught.value.param == "model"


async def test_wrong_key(client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(openai.AuthenticationError):
        await chat(client.with_options(api_key="wrong"))
    with pytest.raises(anthropic.AuthenticationError):
        await claude.with_options(api_key="wrong").messages.create(
            model="small", max_tokens=1, messages=[{"role": "user", "content": "hello"}]
        )


async def test_what_cannot_fit_is_not_tried_again(client: openai.AsyncOpenAI) -> None:
    answers: list[object] = []
    client._client.event_hooks["response"].append(lambda answer: _note(answers, answer))
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(client, "big")
    assert caught.value.status_code == 507
    assert len(answers) == 1


async def _note(answers: list[object], answer: object) -> None:
    answers.append(answer)


async def test_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    assert [getattr(chunk, "word", None) async for chunk in stream] == ["one", "two"]


@pytest.mark.parametrize("path", ["chat", "responses"])
async def test_error_in_a_stream(
    client: openai.AsyncOpenAI, runtime: FakeRuntime, path: str
) -> None:
    async def breaks(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Frame('data: {"type": "ping"}\n\n')
        raise RuntimeFailed("the core died")

    runtime.answer = breaks
    with pytest.raises(openai.APIError, match="the core died") as caught:
        if path == "chat":
            async for _ in await client.chat.completions.create(
                model="small", messages=[{"role": "user", "content": "hello"}], stream=True
            ):
                pass
        else:
            async for _ in await client.responses.create(model="small", input="hi", stream=True):
                pass
    assert caught.value.code == "runtime_failed"


async def test_anthropic(claude: anthropic.AsyncAnthropic, runtime: FakeRuntime) -> None:
    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        if not request.body.get("stream"):
            yield Document(
                b'{"id": "m", "type": "message", "role": "assistant", "model": "small",'
                b' "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn",'
                b' "usage": {"input_tokens": 1, "output_tokens": 1}}'
            )
            return
        yield Frame('event: ping\ndata: {"type": "ping"}\n\n')
        raise RuntimeFailed("the core died")

    runtime.answer = answer
    message = await claude.messages.create(
        model="small", max_tokens=1, messages=[{"role": "user", "content": "hello"}]
    )
    assert message.content[0].type == "text" and message.content[0].text == "hi"
    with pytest.raises(anthropic.APIStatusError, match="the core died"):
        async for _ in await claude.messages.create(
            model="small",
            max_tokens=1,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
        ):
            pass
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.count_tokens(
            model="nobody", messages=[{"role": "user", "content": "hello"}]
        )


async def test_full_queue(
    client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, runtime: FakeRuntime
) -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def waits(request: TextRequest) -> AsyncGenerator[Event, None]:
        began.set()
        await may_end.wait()
        yield Document(b"{}")

    runtime.answer = waits
    runs = asyncio.create_task(chat(client))
    await began.wait()
    waiting = asyncio.create_task(chat(client))
    engine_url = str(client.base_url).replace("/v1/", "/v1/engine")
    async with asyncio.timeout(5):
        while not (await client.get(engine_url, cast_to=dict[str, list[object]]))["queue"]:
            pass
    with pytest.raises(openai.RateLimitError) as caught:
        await chat(client.with_options(max_retries=0))
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(anthropic.RateLimitError):
        await claude.messages.create(
            model="small", max_tokens=1, messages=[{"role": "user", "content": "hello"}]
        )
    may_end.set()
    await asyncio.gather(runs, waiting)
