"""Requests to models: what reaches the engine, and what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from engine.engine import Engine
from engine.errors import OutOfDeviceMemory, RuntimeFailed
from engine.events import Event, Frame
from engine.requests import Priority, SchedulingOptions, TextOperation, TextRequest
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine

CHAT = "/v1/chat/completions"

ROUTES = {
    CHAT: TextOperation.CHAT,
    "/v1/completions": TextOperation.COMPLETION,
    "/v1/responses": TextOperation.RESPONSES,
    "/v1/messages": TextOperation.MESSAGES,
    "/v1/messages/count_tokens": TextOperation.COUNT_TOKENS,
    "/v1/embeddings": TextOperation.EMBEDDINGS,
    "/rerank": TextOperation.RERANK,
    "/v1/rerank": TextOperation.RERANK,
    "/v2/rerank": TextOperation.RERANK,
    "/score": TextOperation.SCORE,
    "/v1/score": TextOperation.SCORE,
    "/classify": TextOperation.CLASSIFY,
    "/v1/classify": TextOperation.CLASSIFY,
    "/v1/moderations": TextOperation.MODERATION,
    "/v1/fill-mask": TextOperation.FILL_MASK,
    "/tokenize": TextOperation.TOKENIZE,
    "/v1/tokenize": TextOperation.TOKENIZE,
    "/detokenize": TextOperation.DETOKENIZE,
    "/v1/detokenize": TextOperation.DETOKENIZE,
}


@pytest.mark.parametrize(("path", "operation"), ROUTES.items())
async def test_body_and_operation_reach_the_runtime(
    client: httpx.AsyncClient, runtime: FakeRuntime, path: str, operation: TextOperation
) -> None:
    answer = await client.post(path, json={"model": "small", "temperature": 0.5})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    # The server keeps the response itself: the model, or its provider, need not.
    kept = {"store": False} if operation is TextOperation.RESPONSES else {}
    assert answer.json() == {"operation": operation, "model": "small", "temperature": 0.5, **kept}
    (request,) = runtime.requests
    assert request.operation is operation
    assert request.request_id == answer.headers["x-request-id"]
    assert request.scheduling == SchedulingOptions()


async def test_every_answer_tells_where_its_time_went(client: httpx.AsyncClient) -> None:
    for body in ({"model": "small"}, {"model": "small", "stream": True}):
        answer = await client.post(CHAT, json=body)
        assert int(answer.headers["openai-processing-ms"]) >= 0
        for phase in ("queue", "load", "run"):
            assert float(answer.headers[f"x-roundhouse-{phase}-ms"]) >= 0


async def test_headers_set_priority_and_timeout(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    headers = {"x-roundhouse-priority": "Batch", "x-roundhouse-timeout": "2.5"}
    await client.post(CHAT, json={"model": "small"}, headers=headers)
    assert runtime.requests[0].scheduling == SchedulingOptions(
        priority=Priority.BATCH, timeout_s=2.5
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-roundhouse-priority", "urgent"),
        ("x-roundhouse-timeout", "soon"),
        ("x-roundhouse-timeout", "0"),
        ("x-roundhouse-timeout", "inf"),
        ("x-roundhouse-timeout", "nan"),
    ],
)
async def test_wrong_header_is_named(client: httpx.AsyncClient, name: str, value: str) -> None:
    answer = await client.post(CHAT, json={"model": "small"}, headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b'{"model": "small", "temperature": NaN}',
        b'{"model": "small", "x": "\\ud800"}',
        b'{"model": "small", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
async def test_body_that_is_no_json_object_is_refused(
    client: httpx.AsyncClient, runtime: FakeRuntime, body: bytes
) -> None:
    answer = await client.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert runtime.requests == []


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}, {"model": ["small"]}])
async def test_missing_model_is_named(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


async def test_foreign_url_is_refused_before_the_engine_sees_it(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    body = {"model": "small", "messages": [{"role": "user", "content": [part]}]}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url"
    assert runtime.requests == []


class TestBodyLimit:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(max_body_bytes=100)

    async def test_declared_length_beyond_the_limit(self, client: httpx.AsyncClient) -> None:
        read = False

        async def body() -> AsyncGenerator[bytes, None]:
            nonlocal read
            read = True
            yield b"x" * 101

        answer = await client.post(CHAT, content=body(), headers={"content-length": "101"})
        assert answer.status_code == 413
        assert not read, "it was read although it told its length"
        assert answer.json()["error"]["code"] == "invalid_request"

    async def test_undeclared_length_beyond_the_limit(self, client: httpx.AsyncClient) -> None:
        sent = 0

        async def endless() -> AsyncGenerator[bytes, None]:
            nonlocal sent
            while True:
                sent += 60
                yield b"x" * 60

        answer = await client.post(CHAT, content=endless())
        assert answer.status_code == 413
        assert sent <= 180, "it was read far beyond the limit"

    async def test_body_at_the_limit_is_taken(self, client: httpx.AsyncClient) -> None:
        body = json.dumps({"model": "small"}).ljust(100).encode()
        assert (await client.post(CHAT, content=body)).status_code == 200


async def test_stream_passes_frames_on_unchanged(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json={"model": "small", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert answer.text == 'data: {"word": "one"}\n\ndata: {"word": "two"}\n\ndata: [DONE]\n\n'


async def test_lease_ends_with_the_answer(client: httpx.AsyncClient, engine: Engine) -> None:
    # The fake runs one request at a time: a lease kept would block the next.
    for body in ({"model": "small"}, {"model": "small", "stream": True}, {"model": "small"}):
        assert (await client.post(CHAT, json=body)).status_code == 200
        assert engine.model_status("small").leases == 0


@pytest.mark.parametrize(
    ("path", "event"),
    [
        (CHAT, None),
        ("/v1/completions", None),
        ("/v1/responses", "error"),
        ("/v1/messages", "error"),
    ],
)
async def test_error_in_a_stream_is_its_last_event(
    client: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime, path: str, event: str | None
) -> None:
    async def breaks(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Frame("data: {}\n\n")
        raise RuntimeFailed("the core died")

    runtime.answer = breaks
    answer = await client.post(path, json={"model": "small"})
    assert answer.status_code == 200
    first, last, end = answer.text.split("\n\n")
    assert (first, end) == ("data: {}", "")
    fields = dict(line.split(": ", 1) for line in last.split("\n"))
    assert fields.get("event") == event
    document = json.loads(fields["data"])
    assert document["error"]["message"] == "the core died"
    if path == "/v1/messages":
        assert document["type"] == "error"
        assert document["request_id"] == answer.headers["x-request-id"]
    else:
        assert document["error"]["code"] == "runtime_failed"
    assert engine.model_status("small").leases == 0


async def test_unexpected_error_in_a_stream_tells_nothing(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    async def breaks(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Frame("data: {}\n\n")
        raise KeyError("a secret")

    runtime.answer = breaks
    answer = await client.post(CHAT, json={"model": "small"})
    assert "secret" not in answer.text
    assert "internal_error" in answer.text


async def test_error_before_the_first_frame_is_a_plain_response(
    client: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime
) -> None:
    async def breaks(request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.body["stream"]:
            raise OutOfDeviceMemory("too long")
        yield Frame("")

    runtime.answer = breaks
    answer = await client.post(CHAT, json={"model": "small", "stream": True})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "out_of_device_memory"
    assert engine.model_status("small").leases == 0


async def test_a_moderation_may_leave_out_the_model(
    tmp_path: Path, runtime: FakeRuntime, settings: ServerSettings
) -> None:
    """As OpenAI's clients do. The first classifier answers."""
    models: list[dict[str, object]] = [
        {"id": "text", "source": "none", "runtime": "fake"},
        {"id": "judge", "source": "none", "runtime": "fake", "task": "classify"},
        {"id": "other", "source": "none", "runtime": "fake", "task": "classify"},
    ]
    for served, status in ((models, 200), (models[:1], 400)):
        engine = fake_engine(runtime, tmp_path, models=served)
        app = create_app(engine, settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
            ) as client,
        ):
            answer = await client.post("/v1/moderations", json={"input": "x"})
            assert answer.status_code == status
            if status == 400:
                assert answer.json()["error"]["param"] == "model"
            named = await client.post("/v1/moderations", json={"model": "text", "input": "x"})
            assert named.status_code == 200
    assert [request.model for request in runtime.requests] == ["judge", "text", "text"]
