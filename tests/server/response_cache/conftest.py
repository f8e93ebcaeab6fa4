"""A server with a cache, whose models never give the same answer twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engine.engine import Engine
from engine.events import Document, Event, Frame, Heard, ImageResult, Segment, Speech
from engine.requests import ImageRequest, SpeechRequest, TextRequest
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine

LIMIT_S = 60


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for what another thread or process does."""
    async with asyncio.timeout(LIMIT_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Fresh:
    """Every answer has the number of its run."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
        self.runs += 1
        match request:
            case TextRequest():
                if request.body.get("stream"):
                    for word in ("one", "two", self.runs):
                        yield Frame(f'data: {{"word": "{word}"}}\n\n')
                    yield Frame("data: [DONE]\n\n")
                else:
                    yield Document(json.dumps({"run": self.runs}).encode())
            case ImageRequest():
                colour = (self.runs, 0, 0)
                images = tuple(Image.new("RGB", (8, 8), colour) for _ in range(request.n))
                yield ImageResult(images, request.seed or 1)
            case SpeechRequest():
                for _ in range(2):
                    yield Speech(np.full(2400, self.runs / 100, np.float32), 24_000)
            case _:
                yield Heard("en", 1.5)
                yield Segment(0, 0.0, 1.5, f" Run {self.runs}.", 0, (1, 2), 0.0, -0.1, 1.0, 0.2)


class Caller:
    """Calls a server, and knows what its cache did."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def post(self, path: str, **request: Any) -> httpx.Response:
        answer = await self.client.post(path, **request)
        assert answer.status_code == 200, answer.text
        return answer

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = (await self.client.get("/v1/engine/cache")).json()
        return status

    async def until(self, entries: int) -> None:
        """Wait until so many answers are kept: they are written behind the answers."""

        async def kept() -> bool:
            return bool((await self.status())["entries"] == entries)

        await until(kept)


@pytest.fixture
def fresh(runtime: FakeRuntime) -> Fresh:
    fresh = Fresh()
    runtime.answer = fresh
    return fresh


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "response-cache.sqlite3"


@pytest.fixture
def settings(cache_file: Path) -> ServerSettings:
    return ServerSettings(response_cache=str(cache_file))


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path, fresh: Fresh) -> Engine:
    return fake_engine(runtime, tmp_path, cache_dir=tmp_path / "models")


@asynccontextmanager
async def serving(
    engine: Engine, settings: ServerSettings, **headers: str
) -> AsyncIterator[Caller]:
    """A server from its start to its end, called as a client on this machine."""
    app = create_app(engine, settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=headers
        ) as client,
    ):
        yield Caller(client)


@pytest.fixture
async def caller(engine: Engine, settings: ServerSettings) -> AsyncIterator[Caller]:
    async with serving(engine, settings) as caller:
        yield caller
