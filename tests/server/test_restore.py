"""Models that come back after a restart, and their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from engine.engine import Engine
from engine.scheduling.scheduler_event import EventKind
from engine.status import ModelState, Restarts
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeDevice, FakeRuntime, fake_engine

CHAT = "/v1/chat/completions"


def restarted(
    runtime: FakeRuntime, folder: Path, models: Sequence[str], **config: object
) -> Engine:
    """As `fake_engine`, after a restart with these models in use."""
    return Engine(
        fake_engine(runtime, folder, **config).config,
        device=FakeDevice(),
        runtimes={"fake": lambda _: runtime},
        restarts=Restarts(1, "it was killed", 1e9),
        restore=models,
    )


@asynccontextmanager
async def client_of(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, ServerSettings())
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client


async def loads(engine: Engine, *, until: str) -> list[str]:
    """The models loaded so far, in order, once that one has."""
    loaded: list[str] = []
    last_id = 0
    async with asyncio.timeout(20):
        while until not in loaded:
            await engine.events.wait(last_id or engine.events.last_id)
            page = engine.events.after(0)
            last_id = page.last_id
            loaded = [e.event.model for e in page.events if e.event.kind is EventKind.LOADED]
    return loaded


async def test_in_the_order_told(
    runtime: FakeRuntime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is configured no more, or cannot be loaded, does not keep the others waiting."""
    engine = restarted(runtime, tmp_path, ["other", "gone", "broken", "small"])
    async with client_of(engine) as client:
        assert await loads(engine, until="small") == ["other", "small"]
        assert "gone is not restored" in caplog.text and "broken is not restored" in caplog.text
        document = (await client.get("/v1/engine")).json()
        assert document["restarts"] == {"count": 1, "reason": "it was killed", "at": 1e9}
        metrics = (await client.get("/metrics")).text
        assert "roundhouse_restarts_total 1.0" in metrics
        assert 'roundhouse_last_restart_timestamp_seconds{reason="it was killed"} 1e+09' in metrics


async def test_nobody_leaves_for_them(runtime: FakeRuntime, tmp_path: Path) -> None:
    limits = {"memory": 1500, "queue_timeout_s": 0.3, "max_overtake_s": 0.01}
    engine = restarted(runtime, tmp_path, ["other", "small"], **limits)
    async with client_of(engine):
        assert await loads(engine, until="other") == ["other"]
        await asyncio.wait(engine._preloading.tasks)
        assert engine.model_status("other").state is ModelState.RESIDENT
        assert engine.model_status("small").state is ModelState.ABSENT


async def test_the_most_asked_for_come_first(engine: Engine) -> None:
    async with client_of(engine) as client:
        for model in ("small", "other", "other", "broken"):
            await client.post(CHAT, json={"model": model})
        assert engine.wanted() == ("other", "small")
        await client.post("/v1/engine/models/other/unload")
        assert engine.wanted() == ("small",)
