from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from engine.config import ModelConfig
from engine.engine import Engine
from engine.requests import Request
from engine.runtimes.base import Prepared
from engine.usage import Usage
from server.app import Application, create_app
from server.keys import watch
from server.keys.limiter import Limiter
from server.keys.record import Key, digest_of, new_secret
from server.keys.store import KeyStore
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine

Bearer = dict[str, str]
AddKey = Callable[..., Bearer]
"""Adds a key to the store; gives the header of who has it."""


class CountingRuntime(FakeRuntime):
    """A fake whose requests take tokens."""

    input_tokens = 3
    output_tokens = 4

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        usage = Usage(input_tokens=self.input_tokens, output_tokens=self.output_tokens)
        return Prepared(request, None, usage=usage)


@pytest.fixture
def runtime() -> CountingRuntime:
    return CountingRuntime()


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    routes = [{"id": "auto", "choose": ["small"]}]
    return fake_engine(runtime, tmp_path, routes=routes)


@pytest.fixture
def store(engine: Engine) -> Iterator[KeyStore]:
    store = KeyStore(engine.config.data_dir)
    yield store
    store.close()


@pytest.fixture
def add_key(store: KeyStore) -> AddKey:
    def add(name: str, **fields: Any) -> Bearer:
        secret = new_secret()
        created_at = int(time.time())
        store.add(Key(name=name, digest=digest_of(secret), created_at=created_at, **fields))
        return {"authorization": f"Bearer {secret}"}

    return add


class Clock:
    """The clock of the limits; it stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings() -> ServerSettings:
    """With a key of the configuration: until it knows a key of the store, it answers 401."""
    return ServerSettings(api_keys=(SecretStr("configured"),))


@pytest.fixture
def app(
    engine: Engine, settings: ServerSettings, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Application:
    """The application, without the keys that a test adds: it takes those up while it runs."""
    monkeypatch.setattr(watch, "LOOK_S", 0.005)
    app = create_app(engine, settings)
    app.keyring._clock = clock
    return app


def limiter_of(app: Application, bearer: Bearer) -> Limiter:
    access = app.keyring.find(bearer["authorization"].removeprefix("Bearer "))
    assert access is not None and access.limiter is not None
    return access.limiter


LIMIT_S = 30
"""A generous limit for what takes moments."""


async def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.005)


async def until(
    client: httpx.AsyncClient, headers: Bearer, status: int, text: str = ""
) -> httpx.Response:
    """Wait until the models are answered so to that key."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            answer = await client.get("/v1/models", headers=headers)
            if answer.status_code == status and text in answer.text:
                return answer
            await asyncio.sleep(0.005)
