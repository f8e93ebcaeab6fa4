"""Routes and fallbacks over HTTP: what is listed, chosen, served and told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event, Frame
from engine.requests import TextRequest
from tests.server.fake import DEVICE_BYTES, FakeRuntime, echo, fake_engine

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
MODELS: list[dict[str, Any]] = [
    {"id": "small", "fallbacks": ["large"], "max_wait": "50ms", "quality": 0.3},
    {"id": "large", "aliases": ["gpt-4o"], "quality": 0.8},
    {"id": "broken", "fallbacks": ["large"], "options": {"error": "the file is torn"}},
    {"id": "big", "options": {"nbytes": 10 * DEVICE_BYTES}},
]
ROUTES = [
    {"id": "auto", "choose": ["small", "gpt-4o", "big"]},
    {"id": "staff", "choose": ["large"], "tiers": ["staff"]},
]


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    models = [{"runtime": "fake", "source": "none", **each} for each in MODELS]
    return fake_engine(runtime, tmp_path, models=models, routes=ROUTES)


async def chat(client: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    return await client.post(CHAT, json={"model": model, "messages": MESSAGES, **more})


async def test_routes_are_listed_beside_the_models(client: httpx.AsyncClient) -> None:
    listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
    assert listed["auto"]["choose"] == ["small", "gpt-4o", "big"]
    assert (await client.get("/v1/models/auto:best")).json()["id"] == "auto"
    found = openai.types.Model.model_validate(listed["auto"])
    assert (found.object, found.owned_by) == ("model", "roundhouse")


async def test_what_would_be_chosen_is_told(client: httpx.AsyncClient) -> None:
    asked = {"body": {"model": "auto:best", "messages": MESSAGES}}
    told = (await client.post("/v1/engine/route", json=asked)).json()
    assert (told["model"], told["prefer"]) == ("large", "best")
    options = {each["model"]: each for each in told["options"]}
    assert [*options] == ["large", "small", "big"]
    assert options["big"]["capable"] is False
    assert options["big"]["reason"] == "at most 9.8 KiB can be freed for it"
    assert told["complexity"]["score"] < 0.1
    chain = (await client.post("/v1/engine/route", json={"body": {"model": "small"}})).json()
    assert [each["model"] for each in chain["options"]] == ["small", "large"]
    assert (chain["prefer"], chain["complexity"]) == (None, None)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "body"),
        ({"body": {}}, "model"),
        ({"body": 5}, "body"),
        ({"body": {"model": "auto"}, "endpoint": "/v1/audio/transcriptions"}, "endpoint"),
        ({"body": {"model": "auto"}, "more": 1}, "more"),
        ({"body": {"model": "auto", "size": "1x"}, "endpoint": "/v1/images/generations"}, "prompt"),
    ],
)
async def test_a_wrong_question_names_its_field(
    client: httpx.AsyncClient, asked: dict[str, Any], param: str
) -> None:
    answer = await client.post("/v1/engine/route", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_the_answer_says_who_gave_it(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "broken")
    assert answer.status_code == 200
    assert answer.headers["x-roundhouse-served-by"] == "large"
    assert answer.headers["x-roundhouse-attempts"] == "broken=model_load_failed"
    plain = await chat(client, "gpt-4o")
    assert plain.headers["x-roundhouse-served-by"] == "large"
    assert "x-roundhouse-attempts" not in plain.headers


async def test_a_stream_begins_at_the_model_that_can(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "broken", stream=True)
    assert answer.headers["x-roundhouse-served-by"] == "large"
    assert answer.text.count("data: ") == 3


async def test_a_request_may_say_how_long_it_waits(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    release = asyncio.Event()

    async def waits(request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.model == "small":
            yield Frame("data: 1\n\n")
            await release.wait()
        else:
            async for event in echo(request):
                yield event

    runtime.answer = waits
    holding = asyncio.create_task(chat(client, "small", stream=True))
    while not runtime.requests:
        await asyncio.wait([holding], timeout=0.01)
    answer = await chat(client, "small", max_wait="10ms")
    assert answer.headers["x-roundhouse-attempts"] == "small=queue_timeout"
    wrong = await chat(client, "small", max_wait="soon")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_wait")
    release.set()
    await holding


async def test_a_route_for_other_tiers_is_refused(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "staff")
    assert (answer.status_code, answer.json()["error"]["param"]) == (403, "model")


async def test_an_error_after_all_names_who_was_tried(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    async def fails(_request: TextRequest) -> AsyncGenerator[Event, None]:
        raise RuntimeFailed("It broke.")
        yield

    runtime.answer = fails
    answer = await chat(client, "small")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == ("It broke. Tried before: small (runtime_failed).")
