"""What the official SDK's requests cost, as headers, metrics and the usage show it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import pytest
from typer.testing import CliRunner

from engine.config import ModelConfig
from engine.costs.usage_store import FILE_NAME
from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Document, Event, Frame
from engine.requests import Request
from engine.runtimes.base import LoadedModel, Prepared
from engine.runtimes.registry import REGISTRY
from engine.section import Section
from server.app import Application, create_app
from server.commands.cli import app as cli
from server.settings import ServerSettings
from tests.server.fake import FakeLoaded, FakeOptions, FakeRuntime, fake_engine, listening

USAGE = "/v1/engine/usage"
TOKENS = {"prompt_tokens": 2_000, "completion_tokens": 1_000, "total_tokens": 3_000}
COST = 2_000 * 1e-6 + 1_000 * 2e-6
KEY, ADMIN_KEY = "sk-alice-very-secret", "sk-admin-very-secret"


class PricedOptions(FakeOptions):
    price: dict[str, float] | None = None
    model: str | None = None


class PricedLoaded(FakeLoaded):
    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        prepared.usage.input_tokens = TOKENS["prompt_tokens"]
        async for event in super().run(prepared):
            prepared.usage.output_tokens = TOKENS["completion_tokens"]
            yield event


class PricedRuntime(FakeRuntime):
    """As that of a provider: it knows its tokens, and costs money."""

    name: ClassVar[str] = "remote"
    Options: ClassVar[type[Section]] = PricedOptions

    async def load(self, model: ModelConfig, on_failure: Any) -> LoadedModel:
        return PricedLoaded(model, self)


async def complete(request: Any) -> AsyncGenerator[Event, None]:
    """A completion of OpenAI's form, as a whole or as a stream."""
    message = {"role": "assistant", "content": "Hello"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    document = {"id": "1", "object": "chat.completion", "created": 1, "model": "cloud"}
    if request.body.get("stream"):
        for _ in range(3):
            delta = {"index": 0, "finish_reason": None, "delta": message}
            chunk = {**document, "object": "chat.completion.chunk", "choices": [delta]}
            yield Frame(f"data: {json.dumps(chunk)}\n\n")
        yield Frame("data: [DONE]\n\n")
    else:
        yield Document(json.dumps({**document, "choices": [choice], "usage": TOKENS}).encode())


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> PricedRuntime:
    monkeypatch.setitem(REGISTRY, "remote", "tests.server.test_usage:PricedRuntime")
    runtime = PricedRuntime()
    runtime.answer = complete
    return runtime


@pytest.fixture
def engine(priced: PricedRuntime, runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return make_engine(priced, runtime, tmp_path)


def make_engine(
    priced: PricedRuntime, runtime: FakeRuntime, folder: Path, **config: object
) -> Engine:
    models: list[dict[str, object]] = [
        {
            "id": "cloud",
            "runtime": "remote",
            "source": "none",
            "options": {"price": {"input": 1.0, "output": 2.0}},
        },
        {"id": "small", "source": "none"},
    ]
    engine = fake_engine(
        runtime, folder, models=[{"runtime": "fake", **m} for m in models], **config
    )
    engine._given_runtimes["remote"] = lambda _: priced
    return engine


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.AsyncOpenAI, model: str = "cloud", **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Hi"}]
    return client.chat.completions.with_raw_response.create(model=model, messages=messages, **more)


async def usage(url: str, query: str = "", **headers: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}{USAGE}{query}", headers=headers)
        document: dict[str, Any] = answer.json()
        return document


async def counted(url: str, requests: int) -> dict[str, Any]:
    """The usage once that many requests are counted: a client may leave before that."""
    async with asyncio.timeout(30):
        while True:
            document = await usage(url)
            if document["total"]["requests"] >= requests:
                return document


async def test_an_answer_says_what_it_cost(sdk: openai.AsyncOpenAI, url: str) -> None:
    answer = await chat(sdk)
    assert float(answer.headers["x-roundhouse-cost"]) == pytest.approx(COST)
    assert answer.headers["x-roundhouse-device-ms"] == "0.0"
    local = await chat(sdk, "small")
    assert local.headers["x-roundhouse-cost"] == "0"
    assert float(local.headers["x-roundhouse-device-ms"]) >= 0
    document = await usage(url)
    rows = {row["model"]: row for row in document["data"]}
    assert rows["cloud"]["cost"] == document["total"]["cost"] == pytest.approx(COST)
    assert (rows["cloud"]["requests"], rows["cloud"]["output_tokens"]) == (1, 1_000)
    assert rows["small"]["device_s"] > 0


async def test_a_stream_is_counted_at_its_end_and_when_it_is_left(
    sdk: openai.AsyncOpenAI, url: str, priced: PricedRuntime
) -> None:
    stream = (await chat(sdk, stream=True)).parse()
    assert len([chunk async for chunk in stream]) == 3
    left = asyncio.Event()

    async def endless(request: Any) -> AsyncGenerator[Event, None]:
        try:
            async for event in complete(request):
                yield event
                await asyncio.sleep(0 if isinstance(event, Document) else 60)
        finally:
            left.set()

    priced.answer = endless
    answer = await chat(sdk, stream=True)
    assert "x-roundhouse-cost" not in answer.headers  # they go before the tokens
    async for _ in answer.parse():
        break
    await answer.http_response.aclose()
    await asyncio.wait_for(left.wait(), 30)
    total = (await counted(url, 2))["total"]
    assert total["cost"] == pytest.approx(2 * COST)
    assert total["failures"] == 0


async def test_a_failure_is_counted_and_releases_what_it_reserved(
    priced: PricedRuntime, runtime: FakeRuntime, tmp_path: Path
) -> None:
    async def fail(_: Request) -> AsyncGenerator[Event, None]:
        raise RuntimeFailed("torn")
        yield Document(b"")

    async def fail_later(request: Request) -> AsyncGenerator[Event, None]:
        async for event in complete(request):
            yield event
            raise RuntimeFailed("torn")

    async def forever(_: Request) -> AsyncGenerator[Event, None]:
        await asyncio.Event().wait()
        yield Document(b"")

    engine = make_engine(priced, runtime, tmp_path, budgets=[{"day": 1.0}])
    app = create_app(engine, ServerSettings())
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        for answer in (fail, fail_later):
            priced.answer = answer
            with pytest.raises(openai.APIError):
                async for _ in (await chat(sdk, stream=True)).parse():
                    pass
        priced.answer = forever
        with pytest.raises(openai.APITimeoutError):
            await chat(sdk, timeout=0.2)
        with pytest.raises(openai.NotFoundError):
            await chat(sdk, "nothing")
        document = await counted(url, 3)
        assert document["total"]["failures"] == 3
        (budget,) = document["budgets"]
        assert budget["reserved"] == 0.0
        assert budget["spent"] == pytest.approx(document["total"]["cost"])


async def test_a_spent_budget_is_429_and_is_told(
    priced: PricedRuntime, runtime: FakeRuntime, tmp_path: Path
) -> None:
    budgets = [{"provider": "cloud", "month": COST}]
    engine = make_engine(priced, runtime, tmp_path, budgets=budgets)
    async with (
        listening(create_app(engine, ServerSettings())) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as sdk,
    ):
        await chat(sdk)
        with pytest.raises(openai.RateLimitError) as refused:
            await chat(sdk)
        assert refused.value.code == "budget_exceeded"
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert len(priced.requests) == 1  # and the client did not try again
        await chat(sdk, "small")
        async with httpx.AsyncClient(base_url=url) as client:
            events = (await client.get("/v1/engine/events")).json()["data"]
            metrics = (await client.get("/metrics")).text
            document = (await client.get("/openapi.json")).json()
        assert USAGE in document["paths"]
    (told,) = [event for event in events if event["type"] == "budget"]
    assert told["reason"].startswith("100% of the budget for the provider 'cloud'")
    cost = 'roundhouse_cost_dollars_total{model="cloud",provider="cloud"} 0.004'
    assert cost in metrics
    for kind, tokens in (("input", 2000), ("output", 1000)):
        labels = f'kind="{kind}",model="cloud",provider="cloud"'
        assert f"roundhouse_tokens_total{{{labels}}} {tokens}.0" in metrics


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?by=colour", "by"),
        ("?by=day,day", "by"),
        ("?since=yesterday", "since"),
        ("?until=2026-02-30", "until"),
        ("?from=2026-02-03", "from"),
    ],
)
async def test_a_wrong_query_is_named(client: httpx.AsyncClient, query: str, param: str) -> None:
    answer = await client.get(f"{USAGE}{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.fixture
def keyed_app(engine: Engine) -> Application:
    settings = ServerSettings.model_validate({"api_keys": [KEY], "admin_keys": [ADMIN_KEY]})
    return create_app(engine, settings)


async def test_a_key_sees_its_own_and_no_key_is_in_the_file(
    keyed_app: Application, tmp_path: Path
) -> None:
    async with listening(keyed_app) as url:
        for key in (KEY, KEY, ADMIN_KEY):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as sdk:
                await chat(sdk)
        everything = await usage(url, "?by=key", **{"x-api-key": ADMIN_KEY})
        assert {row["key"]: row["requests"] for row in everything["data"]} == {
            "config-1": 2,
            "config-admin-1": 1,
        }
        only = await usage(url, "?by=key&key=config-1", **{"x-api-key": ADMIN_KEY})
        own = await usage(url, "?by=key", **{"x-api-key": KEY})
        assert [row["key"] for row in own["data"]] == ["config-1"]
        assert own["total"] == only["total"]
        refused = await usage(url, "?key=bob", **{"x-api-key": KEY})
        assert refused["error"]["param"] == "key"
        assert "error" in await usage(url)
    with sqlite3.connect(tmp_path / "data" / FILE_NAME) as connection:
        rows = connection.execute("SELECT key FROM usage").fetchall()
    assert sorted(rows) == [("config-1",), ("config-admin-1",)]
    for path in (tmp_path / "data").glob(f"{FILE_NAME}*"):
        assert b"very-secret" not in path.read_bytes()


async def test_the_command_shows_it(sdk: openai.AsyncOpenAI, url: str) -> None:
    await chat(sdk)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["usage", "--url", url, *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    table = await asyncio.to_thread(run, "--by", "month,provider")
    assert "cloud" in table and "$0.0040" in table
    document = json.loads(await asyncio.to_thread(run, "--json"))
    assert document["data"][0]["model"] == "cloud"
