"""Request ids, HTTP metrics, how registries are joined, and requests that are given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import ShuttingDown
from engine.events import Event, Frame
from engine.requests import TextRequest
from server.app import Application
from server.metrics import HttpMetrics, render
from tests.server.fake import FakeRuntime, listening
from tests.server.serve_fake import wait_for_pipe

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 128])
async def test_sane_request_id_is_kept(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "a/b", "é"])
async def test_other_request_ids_are_replaced(client: httpx.AsyncClient, given: str) -> None:
    headers = {b"x-request-id": given.encode("latin-1")}
    ids = [(await client.get("/v1/models", headers=headers)).headers["x-request-id"] for _ in "12"]
    assert ids[0] != ids[1]
    assert given.encode("latin-1") not in [each.encode() for each in ids]


async def test_anthropics_clients_read_the_id_by_their_own_name(client: httpx.AsyncClient) -> None:
    body = {"model": "nobody", "messages": [], "max_tokens": 1}
    answer = await client.post("/v1/messages", json=body)
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert answer.json()["request_id"] == answer.headers["request-id"]
    assert "request-id" not in (await client.get("/v1/models")).headers


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_are_counted_by_route_template(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json={"model": "small", "stream": True})
    await client.post(CHAT, json={"model": "nobody"})
    await client.get("/v1/models/org/small")
    await client.get("/secret/path")
    await client.request("BREW", "/secret/path")
    samples = await scrape(client)

    def count(route: str, method: str, status: int) -> float | None:
        return samples.get(
            (
                "roundhouse_http_requests_total",
                f"method={method}",
                f"route={route}",
                f"status={status}",
            )
        )

    assert count(CHAT, "POST", 200) == 1
    assert count(CHAT, "POST", 404) == 1
    assert count("/v1/models/{name:path}", "GET", 200) == 1
    assert count("unmatched", "GET", 404) == 1
    assert count("unmatched", "OTHER", 404) == 1
    assert samples["roundhouse_http_request_seconds_count", f"route={CHAT}"] == 2
    assert not any("secret" in part for key in samples for part in key)


async def test_engine_series_are_rendered_too(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json={"model": "small"})  # is answered once the engine has started
    samples = await scrape(client)
    assert samples["roundhouse_capacity_bytes",] == 10_000


async def test_openmetrics_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = await client.get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_a_family_in_two_registries_appears_once() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    for registry, model in ((first, "a"), (second, "b")):
        Counter("tokens", "Tokens.", ("model",), registry=registry).labels(model).inc(2)
    text = render((first, second, first), "")[0].decode()
    assert text.count("# TYPE tokens_total counter") == 1
    assert text.count('tokens_total{model="a"} 2.0') == 1
    assert text.count('tokens_total{model="b"} 2.0') == 1


def test_the_same_series_in_two_registries_appears_once() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    for registry in (first, second):
        Gauge("level", "Level.", registry=registry).set(1)
    text = render((first, second), "")[0].decode()
    assert text.count("\nlevel 1.0") == 1


def test_a_name_with_two_types_keeps_the_first() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Gauge("level", "Level.", registry=first).set(1)
    Counter("level", "Level.", registry=second).inc()
    assert render((first, second), "")[0] == generate_latest(first)


def test_a_method_of_the_clients_invention_makes_no_series() -> None:
    metrics = HttpMetrics()
    for method in ("BREW", "WHEN"):
        metrics.observe(None, method, 404, 0.1)
    assert (
        'roundhouse_http_requests_total{method="OTHER",route="unmatched",status="404"} 2.0'
        in generate_latest(metrics.registry).decode()
    )


async def test_who_waits_is_told_to_come_again(app: Application, runtime: FakeRuntime) -> None:
    begun = asyncio.Event()

    async def never(request: TextRequest) -> AsyncGenerator[Event, None]:
        begun.set()
        await asyncio.Event().wait()
        yield Frame("")

    runtime.answer = never
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        waiting = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
        await begun.wait()
        queued = asyncio.create_task(client.post("/v1/messages", json={"model": "small"}))
        while not (await client.get("/v1/engine")).json()["queue"]:
            pass
        await app.requests.give_up(ShuttingDown("The server is being restarted.", retry_after_s=5))
        for answer, kind in ((await waiting, "server_error"), (await queued, "overloaded_error")):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["type"] == kind


async def test_a_stream_that_has_begun_gets_no_second_answer(
    app: Application, runtime: FakeRuntime
) -> None:
    runtime.answer = wait_for_pipe
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        body = {"model": "small", "stream": True}
        async with client.stream("POST", CHAT, json=body) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == "data: first"
            await app.requests.give_up(ShuttingDown("Restarting.", retry_after_s=5))
            assert [(each.begun, each.given_up) for each in app.requests._open] == [(True, False)]


async def test_nothing_is_kept_of_what_was_answered(app: Application) -> None:
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        assert (await client.get("/health")).status_code == 200
    assert not app.requests._open
