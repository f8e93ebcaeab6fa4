"""The limits of keys over HTTP: what is refused, what is told, and what is given back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from engine.engine import Engine
from engine.errors import OutOfDeviceMemory, RuntimeFailed
from engine.events import Document, Event, Frame, Progress
from engine.requests import TextRequest
from server.app import Application
from server.keys.limiter import RATE_LIMIT_HEADERS, Limiter
from tests.server.fake import FakeRuntime, listening
from tests.server.keys.conftest import (
    LIMIT_S,
    AddKey,
    Bearer,
    Clock,
    CountingRuntime,
    eventually,
    limiter_of,
    until,
)

CHAT = "/v1/chat/completions"
BODY = {"model": "small"}
STREAM = {"model": "small", "stream": True}


def told(answer: httpx.Response) -> dict[str, str]:
    start = "x-ratelimit-"
    return {n.removeprefix(start): v for n, v in answer.headers.items() if n.startswith(start)}


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


async def test_requests_a_minute(
    client: httpx.AsyncClient, add_key: AddKey, clock: Clock, runtime: FakeRuntime
) -> None:
    key = add_key("alice", requests_per_minute=3)
    answer = await until(client, key, 200)
    assert told(answer) == {
        "limit-requests": "3", "remaining-requests": "3", "reset-requests": "0s",
    }  # fmt: skip
    for left, body in ((2, BODY), (1, STREAM), (0, {"model": "nobody"})):
        answer = await client.post(CHAT, headers=key, json=body)
        assert told(answer)["remaining-requests"] == str(left)
    served = len(runtime.requests)
    refused = await client.post(CHAT, headers=key, json=BODY)
    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20"
    assert told(refused) == {
        "limit-requests": "3", "remaining-requests": "0", "reset-requests": "1m0s",
    }  # fmt: skip
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert len(runtime.requests) == served
    # What runs no model is not counted.
    assert (await client.get("/v1/models", headers=key)).status_code == 200
    clock.now += 20
    assert (await client.post(CHAT, headers=key, json=BODY)).status_code == 200


async def test_tokens_a_minute(
    client: httpx.AsyncClient, add_key: AddKey, clock: Clock, runtime: CountingRuntime
) -> None:
    key = add_key("alice", tokens_per_minute=10)
    await until(client, key, 200)
    answer = await client.post(CHAT, headers=key, json=BODY)
    # Charged by then, as the document is complete.
    assert told(answer) == {
        "limit-tokens": "10", "remaining-tokens": "3", "reset-tokens": "42s",
    }  # fmt: skip
    answer = await client.post(CHAT, headers=key, json=STREAM)
    assert told(answer)["remaining-tokens"] == "3"  # its head was sent before it ended
    refused = await client.post(CHAT, headers=key, json=BODY)
    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "24"
    assert told(refused) == {
        "limit-tokens": "10", "remaining-tokens": "0", "reset-tokens": "1m24s",
    }  # fmt: skip
    clock.now += 24.1
    assert (await client.post(CHAT, headers=key, json=BODY)).status_code == 200


async def test_tokens_of_a_run_that_fails_or_is_left_are_charged(
    app: Application, url: str, add_key: AddKey, runtime: CountingRuntime
) -> None:
    key = add_key("alice", tokens_per_minute=1000)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        await until(client, key, 200)
        limiter = limiter_of(app, key)
        runtime.answer = fail_midway
        await client.post(CHAT, headers=key, json=STREAM)
        assert limiter.headers()["x-ratelimit-remaining-tokens"] == "993"
        runtime.answer = never_ends
        async with client.stream("POST", CHAT, headers=key, json=STREAM) as answer:
            assert await anext(answer.aiter_lines())
        await eventually(lambda: limiter.running == 0)
        assert limiter.headers()["x-ratelimit-remaining-tokens"] == "986"


@pytest.mark.parametrize("begins", [False, True])
async def test_a_run_that_is_tried_twice_is_charged_once(
    client: httpx.AsyncClient, add_key: AddKey, runtime: CountingRuntime, begins: bool
) -> None:
    async def too_large_once(request: TextRequest) -> AsyncGenerator[Event, None]:
        if begins:
            yield Progress(0.1)
        if len(runtime.requests) == 1:
            raise OutOfDeviceMemory("too large")
        yield Frame("data: done\n\n")

    runtime.answer = too_large_once
    key = add_key("alice", tokens_per_minute=100)
    await until(client, key, 200)
    answer = await client.post(CHAT, headers=key, json=STREAM)
    assert (answer.status_code, answer.text) == (200, "data: done\n\n")
    assert len(runtime.requests) == 2
    left = told(await client.get("/v1/models", headers=key))["remaining-tokens"]
    assert left == "93"


async def test_the_official_client_is_told_when_to_come_again(url: str, add_key: AddKey) -> None:
    key = add_key("alice", requests_per_minute=1)
    async with httpx.AsyncClient(base_url=url) as client:
        await until(client, key, 200)
    secret = key["authorization"].removeprefix("Bearer ")
    sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)
    raw = await sdk.chat.completions.with_raw_response.create(model="small", messages=[])
    assert raw.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError) as caught:
        await sdk.chat.completions.create(model="small", messages=[])
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "60"
    assert "x-should-retry" not in caught.value.response.headers


async def test_a_hundred_at_once_against_requests_a_minute(
    client: httpx.AsyncClient, add_key: AddKey, runtime: FakeRuntime
) -> None:
    key, other = add_key("alice", requests_per_minute=10), add_key("bob")
    await until(client, other, 200)
    answers = await asyncio.gather(
        *(client.post(CHAT, headers=key, json=BODY) for _ in range(100)),
        *(client.post(CHAT, headers=other, json=BODY) for _ in range(20)),
    )
    assert Counter(each.status_code for each in answers[:100]) == {200: 10, 429: 90}
    assert {each.status_code for each in answers[100:]} == {200}
    assert sorted(int(told(each)["remaining-requests"]) for each in answers[:100])[-1] <= 9
    assert not told(answers[100])
    assert len(runtime.requests) == 30


async def test_a_hundred_at_once_against_requests_at_once(
    app: Application, client: httpx.AsyncClient, add_key: AddKey, runtime: FakeRuntime
) -> None:
    may_go = asyncio.Event()

    async def gated(request: TextRequest) -> AsyncGenerator[Event, None]:
        await may_go.wait()
        yield Document(b"{}")

    runtime.answer = gated
    key = add_key("alice", concurrent=5)
    await until(client, key, 200)
    waiting = [asyncio.create_task(client.post(CHAT, headers=key, json=BODY)) for _ in range(100)]
    await eventually(lambda: sum(each.done() for each in waiting) == 95)
    assert limiter_of(app, key).running == 5
    assert (await client.get("/v1/models", headers=key)).status_code == 200
    may_go.set()
    answers = await asyncio.gather(*waiting)
    assert Counter(each.status_code for each in answers) == {200: 5, 429: 95}
    refused = next(each for each in answers if each.status_code == 429)
    assert code_of(refused) == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    assert limiter_of(app, key).running == 0


# Every way out gives back.


async def fail_midway(request: TextRequest) -> AsyncGenerator[Event, None]:
    yield Frame("data: one\n\n")
    raise RuntimeFailed("the library failed")


async def fail_at_once(request: TextRequest) -> AsyncGenerator[Event, None]:
    raise ValueError("a bug")
    yield Frame("")


async def never_begins(request: TextRequest) -> AsyncGenerator[Event, None]:
    await asyncio.Event().wait()
    yield Frame("")


async def never_ends(request: TextRequest) -> AsyncGenerator[Event, None]:
    yield Frame("data: one\n\n")
    await asyncio.Event().wait()


Way = Callable[[httpx.AsyncClient, Bearer, FakeRuntime, Limiter], Awaitable[None]]


async def answered(
    client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, limiter: Limiter
) -> None:
    """With what would be an answer of any kind: each is over before its last byte is read."""
    for path, sent in (
        (CHAT, {"json": BODY}),
        (CHAT, {"json": STREAM}),
        (CHAT, {"json": {"model": "nobody"}}),
        (CHAT, {"json": {"model": "broken"}}),
        (CHAT, {"json": {"model": "big"}}),
        (CHAT, {"content": b"no JSON"}),
        (CHAT, {"json": {}}),
        ("/v1/images/generations", {"json": {"model": "small", "nope": 1}}),
        ("/v1/audio/transcriptions", {"content": b"no form"}),
        ("/v1/videos", {"json": {"model": "nobody", "prompt": "a"}}),
    ):
        answer = await client.post(path, headers=key, **sent)
        assert answer.status_code != 429, path
        assert limiter.running == 0, path


async def failed(
    client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, limiter: Limiter
) -> None:
    runtime.answer = fail_midway
    answer = await client.post(CHAT, headers=key, json=STREAM)
    assert answer.status_code == 200 and "the library failed" in answer.text
    assert limiter.running == 0
    runtime.answer = fail_at_once
    assert (await client.post(CHAT, headers=key, json=BODY)).status_code == 500


async def left_before_the_answer(
    client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, limiter: Limiter
) -> None:
    runtime.answer = never_begins
    task = asyncio.create_task(client.post(CHAT, headers=key, json=BODY))
    await eventually(lambda: limiter.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def left_in_a_stream(
    client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, limiter: Limiter
) -> None:
    runtime.answer = never_ends
    async with client.stream("POST", CHAT, headers=key, json=STREAM) as answer:
        assert await anext(answer.aiter_lines())
        assert limiter.running == 1


async def left_while_sending(
    client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, limiter: Limiter
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.Event().wait()

    task = asyncio.create_task(client.post(CHAT, headers=key, content=endless()))
    await eventually(lambda: limiter.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "way", [answered, failed, left_before_the_answer, left_in_a_stream, left_while_sending]
)
async def test_every_way_out_gives_back(
    app: Application, url: str, add_key: AddKey, runtime: FakeRuntime, way: Way
) -> None:
    key = add_key("alice", concurrent=1)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        await until(client, key, 200)
        limiter = limiter_of(app, key)
        usual = runtime.answer
        await way(client, key, runtime, limiter)
        await eventually(lambda: limiter.running == 0)
        runtime.answer = usual
        assert (await client.post(CHAT, headers=key, json=BODY)).status_code == 200
        assert limiter.running == 0


async def test_a_cancelled_request_gives_back(
    app: Application, client: httpx.AsyncClient, add_key: AddKey, runtime: FakeRuntime
) -> None:
    """As the server cancels what still runs when it stops."""
    key = add_key("alice", concurrent=1)
    await until(client, key, 200)
    runtime.answer = never_begins
    body = asyncio.Queue[dict[str, Any]]()
    body.put_nowait({"type": "http.request", "body": b'{"model": "small"}'})

    async def send(message: Any) -> None:
        raise AssertionError(message)

    headers = [(name.encode(), value.encode()) for name, value in key.items()]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "app": app}
    task = asyncio.create_task(app.requests({**scope, "query_string": b""}, body.get, send))
    limiter = limiter_of(app, key)
    await eventually(lambda: limiter.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert limiter.running == 0


async def test_who_sends_one_after_another_is_never_refused(url: str, add_key: AddKey) -> None:
    """The place is free before the last byte is sent, so that the next request finds it free."""
    key = add_key("alice", concurrent=1)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        await until(client, key, 200)
        for number in range(20):
            body = STREAM if number % 2 else BODY
            answer = await client.post(CHAT, headers=key, json=body)
            assert answer.status_code == 200, number


async def test_a_page_may_read_the_headers(app: Application) -> None:
    from server.cors import EXPOSED_HEADERS

    assert len(RATE_LIMIT_HEADERS) == 6
    assert set(RATE_LIMIT_HEADERS) <= set(EXPOSED_HEADERS)


async def test_no_key_is_shown_anywhere(
    app: Application,
    engine: Engine,
    add_key: AddKey,
    runtime: FakeRuntime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    keys = [add_key("alice", requests_per_minute=2, admin=True), add_key("bob", revoked_at=1)]
    keys.append({"authorization": "Bearer sk-rh-" + "x" * 43})
    texts: list[str] = []
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        await until(client, keys[0], 200)
        for key in keys:
            for method, path in (
                ("POST", CHAT), ("POST", CHAT), ("POST", CHAT), ("GET", "/metrics"),
                ("GET", "/v1/engine"), ("GET", "/v1/engine/events"), ("GET", "/v1/models"),
                ("GET", "/openapi.json"), ("POST", "/v1/engine/models/small/load"),
            ):  # fmt: skip
                answer = await client.request(method, path, headers=key, json=BODY)
                texts += [answer.text, str(answer.headers)]
    texts.append(caplog.text)
    texts.append(repr(runtime.requests))
    content = b"".join(path.read_bytes() for path in engine.config.data_dir.glob("keys.db*"))
    texts.append(content.decode("latin-1"))
    assert "SQLite" in texts[-1] and "alice" in texts[-1]
    for key in keys:
        secret = key["authorization"].removeprefix("Bearer ")
        assert not [text for text in texts if secret in text or secret[-12:] in text]
