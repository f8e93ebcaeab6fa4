"""Request ids, HTTP metrics, and how registries are joined."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import HttpMetrics, render

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
