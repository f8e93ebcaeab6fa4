from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from engine.engine import Engine
from engine.runtimes.registry import REGISTRY
from server.app import Application, create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening
from tests.server.real import Server


@pytest.fixture(autouse=True)
def fake_registered(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> None:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The starter configuration, as a newcomer starts it."""
    server = Server(tmp_path_factory.mktemp("home"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def sdk(server: Server) -> openai.OpenAI:
    """OpenAI's own client of it."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings()


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path, max_queue_per_model=1)


@pytest.fixture
def app(engine: Engine, settings: ServerSettings) -> Application:
    return create_app(engine, settings)


@pytest.fixture
async def client(app: Application) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the application directly, as a client on this machine."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client,
    ):
        yield client


@pytest.fixture
async def url(app: Application) -> AsyncIterator[str]:
    """The application behind real sockets."""
    async with listening(app) as url:
        yield url
