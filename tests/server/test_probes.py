"""What watchers see while the engine starts, runs, drains, and fails to start."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from engine.engine import Engine
from engine.errors import ConfigError
from server.app import create_app
from server.settings import ServerSettings
from server.start import Start
from tests.server.fake import FakeRuntime

CHAT = "/v1/chat/completions"


async def probe(client: httpx.AsyncClient) -> tuple[int, ...]:
    return tuple([(await client.get(path)).status_code for path in ("/health", "/ready", "/ping")])


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def test_life(engine: Engine, runtime: FakeRuntime) -> None:
    runtime.may_start.clear()
    start = Start(engine)
    app = create_app(engine, ServerSettings(), start)
    async with client_of(app) as client:
        async with app.router.lifespan_context(app):
            assert await probe(client) == (200, 503, 204)
            early = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
            assert (await client.get("/v1/engine")).json()["state"] == "starting"
            runtime.may_start.set()
            assert (await early).status_code == 200, "a request made while starting was refused"
            await asyncio.wait_for(start.done.wait(), 5)
            assert await probe(client) == (200, 200, 200)
            assert (await client.head("/health")).status_code == 200
            await engine.drain(1)
            assert await probe(client) == (200, 503, 503)
        assert await probe(client) == (503, 503, 503)


@pytest.mark.parametrize(
    "error", [ConfigError("no device"), ImportError("no vllm"), RuntimeError("driver")]
)
async def test_failed_start(engine: Engine, runtime: FakeRuntime, error: Exception) -> None:
    runtime.start_error = error
    start = Start(engine)
    app = create_app(engine, ServerSettings(), start)
    async with app.router.lifespan_context(app), client_of(app) as client:
        await asyncio.wait_for(start.failed.wait(), 5)
        assert str(error) in str(start.error)
        assert await probe(client) == (503, 503, 503)


async def test_stopped_while_it_starts(app: FastAPI, engine: Engine, runtime: FakeRuntime) -> None:
    runtime.may_start.clear()
    async with asyncio.timeout(10), app.router.lifespan_context(app):
        pass
    assert engine.state.value == "stopped"
    runtime.may_start.set()  # lets the thread of the start end
