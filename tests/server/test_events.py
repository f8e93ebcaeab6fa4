"""The engine's events, as a document and as a stream that can be gone on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine.engine import Engine
from engine.scheduling.event_log import KEPT
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from server import event_stream

CHAT = "/v1/chat/completions"
EVENTS = "/v1/engine/events"
TIMEOUT_S = 60


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(base_url=url) as client:
        while (await client.get("/ready")).status_code != 200:
            pass
        yield client


@asynccontextmanager
async def following(
    client: httpx.AsyncClient, after: int | None = None
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The fields of each event as it comes."""
    headers = {} if after is None else {"last-event-id": str(after)}
    params = {"stream": "true"}
    async with client.stream("GET", EVENTS, params=params, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _events(response)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    fields: dict[str, Any] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = json.loads(value) if name == "data" else value
        elif fields:
            yield fields
            fields = {}


async def test_a_load_and_its_reasons(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json={"model": "small"})
    await http.post("/v1/engine/models/small/unload")
    document = (await http.get(EVENTS)).json()
    events = document["data"]
    assert [event["type"] for event in events] == ["load", "loaded", "grant", "unload", "unloaded"]
    assert {event["model"] for event in events} == {"small"}
    assert [event["id"] for event in events] == list(
        range(events[0]["id"], events[0]["id"] + len(events))
    )
    assert events[2]["request_id"] == answer.headers["x-request-id"]
    assert events[3]["reason"] == "asked to"
    assert 0 < events[3]["granted_bytes"] <= events[3]["capacity_bytes"]
    assert document["last_id"] == events[-1]["id"]
    assert document["lost"] is None


async def test_failures_are_events(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json={"model": "broken"})
    events = (await http.get(EVENTS)).json()["data"]
    failed = next(event for event in events if event["type"] == "load_failed")
    assert "the file is torn" in failed["reason"]
    refused = next(event for event in events if event["type"] == "refuse")
    assert refused["reason"] and refused["request_id"]


async def test_pages(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json={"model": "small"})
    whole = (await http.get(EVENTS)).json()["data"]
    page = (await http.get(EVENTS, params={"after": 0, "limit": 2})).json()
    assert (page["data"], page["has_more"]) == (whole[:2], True)
    rest = (await http.get(EVENTS, params={"after": page["last_id"]})).json()
    assert (rest["data"], rest["has_more"]) == (whole[2:], False)
    newest = (await http.get(EVENTS, params={"limit": 1})).json()
    assert (newest["data"], newest["has_more"]) == (whole[-1:], False)


@pytest.mark.parametrize(
    ("query", "param"), [({"limit": "0"}, "limit"), ({"after": "x"}, "after"), ({"a": "1"}, "a")]
)
async def test_wrong_queries(http: httpx.AsyncClient, query: dict[str, str], param: str) -> None:
    answer = await http.get(EVENTS, params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_wrong_last_event_id(http: httpx.AsyncClient) -> None:
    answer = await http.get(EVENTS, params={"stream": "1"}, headers={"last-event-id": "x1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "last-event-id")


async def test_events_are_sent_as_they_come(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json={"model": "other"})  # before: not sent
    async with following(http) as events:
        await http.post(CHAT, json={"model": "small"})
        got = [await anext(events) for _ in range(3)]
    assert [event["event"] for event in got] == ["load", "loaded", "grant"]
    assert [event["data"]["model"] for event in got] == ["small"] * 3
    assert [int(event["id"]) for event in got] == [event["data"]["id"] for event in got]


async def test_a_client_that_was_away_goes_on_where_it_was(http: httpx.AsyncClient) -> None:
    async with following(http) as events:
        await http.post(CHAT, json={"model": "small"})
        first = await anext(events)
    await http.post(CHAT, json={"model": "other"})
    wanted = (await http.get(EVENTS, params={"after": first["id"]})).json()["data"]
    async with following(http, after=int(first["id"])) as events:
        assert [(await anext(events))["data"] for _ in wanted] == wanted


async def test_accept_is_enough(http: httpx.AsyncClient) -> None:
    accept = {"accept": "text/event-stream"}
    async with http.stream("GET", EVENTS, headers=accept) as response:
        assert response.headers["content-type"].startswith("text/event-stream")


async def test_who_was_away_too_long_is_told_what_is_lost(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    begin = engine.events.last_id
    for _ in range(KEPT + 7):
        engine.events.append(SchedulerEvent(EventKind.LOAD, "small", "", 0, 0))
    async with following(http, after=begin) as events:
        lost = await anext(events)
        assert (lost["event"], lost["data"]["count"]) == ("lost", 7)
        assert int((await anext(events))["id"]) == begin + 8


async def test_silence_is_kept_alive(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.01)
    async with http.stream("GET", EVENTS, params={"stream": "true"}) as response:
        assert (await anext(response.aiter_text())).startswith(": ")


async def test_a_drain_ends_the_stream(http: httpx.AsyncClient, engine: Engine) -> None:
    await http.post(CHAT, json={"model": "small"})
    async with following(http) as events:
        await engine.drain(5)
        assert [event["event"] async for event in events] == ["unload", "unloaded"]


async def test_a_client_that_leaves_is_let_go(http: httpx.AsyncClient, engine: Engine) -> None:
    async with following(http):
        pass
    await http.post(CHAT, json={"model": "small"})
    while any("ConnectedResponse" in repr(task) for task in asyncio.all_tasks()):
        await http.get("/v1/engine")
