"""Listing models, the engine's status, and the admin's orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest

from engine.events import Document, Event
from engine.requests import TextRequest
from tests.server.fake import MODEL_BYTES, FakeRuntime

CHAT = "/v1/chat/completions"


async def test_every_name_is_listed(client: httpx.AsyncClient) -> None:
    document = (await client.get("/v1/models")).json()
    assert document["object"] == "list"
    assert {model["id"]: model["alias_of"] for model in document["data"]} == {
        "small": None,
        "gpt-4o": "small",
        "org/small": "small",
        "other": None,
        "big": None,
        "broken": None,
    }


@pytest.mark.parametrize("name", ["small", "gpt-4o", "org/small", "org%2Fsmall"])
async def test_a_model_is_told_under_the_name_asked(client: httpx.AsyncClient, name: str) -> None:
    model = (await client.get(f"/v1/models/{name}")).json()
    assert model["id"] == name.replace("%2F", "/")
    assert (model["object"], model["owned_by"]) == ("model", "roundhouse")
    assert isinstance(model["created"], int)
    assert model["state"] == "absent"


async def test_last_error_is_shown(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json={"model": "broken"})
    model = (await client.get("/v1/models/broken")).json()
    assert "the file is torn" in model["last_error"]


async def test_status_adds_up(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json={"model": "small"})
    ledger = (await client.get("/v1/engine")).json()["ledger"]
    assert ledger["granted_bytes"] == MODEL_BYTES
    assert ledger["granted_bytes"] == sum(entry["nbytes"] for entry in ledger["entries"])
    assert ledger["free_bytes"] == ledger["capacity_bytes"] - ledger["granted_bytes"]


async def test_endless_keep_alive_is_null(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/engine")).json()["models"]
    assert {model["id"]: model["keep_alive_s"] for model in models}["other"] is None
    assert (await client.get("/v1/models/other")).json()["keep_alive_s"] is None


async def test_orders(client: httpx.AsyncClient) -> None:
    async def order(word: str, name: str = "org/small") -> httpx.Response:
        return await client.post(f"/v1/engine/models/{name}/{word}")

    loaded = (await order("load")).json()
    assert (loaded["state"], loaded["device_bytes"]) == ("resident", MODEL_BYTES)
    assert (await order("pin")).json()["pinned"] is True
    refused = await order("unload")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert (await order("unpin")).json()["pinned"] is False
    unloaded = (await order("unload")).json()
    assert (unloaded["state"], unloaded["device_bytes"]) == ("absent", 0)
    for word in ("load", "unload", "pin", "unpin"):
        assert (await order(word, "nobody")).status_code == 404
    assert (await order("load", "big")).status_code == 507


async def test_a_model_in_use_is_not_unloaded(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def waits(request: TextRequest) -> AsyncGenerator[Event, None]:
        began.set()
        await may_end.wait()
        yield Document(b"{}")

    runtime.answer = waits
    call = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
    await began.wait()
    assert (await client.post("/v1/engine/models/small/unload")).status_code == 409
    may_end.set()
    assert (await call).status_code == 200


async def test_the_list_answers_head_and_a_trailing_slash(client: httpx.AsyncClient) -> None:
    wanted = (await client.get("/v1/models")).json()
    assert (await client.get("/v1/models/")).json() == wanted
    assert (await client.head("/v1/models")).status_code == 200
    assert (await client.head("/v1/models/")).status_code == 200
