from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.events import Event
from engine.requests import (
    Request,
    TextOperation,
    TextRequest,
)
from engine.runtimes.base import LoadedModel, Prepared, RuntimeContext
from engine.runtimes.remote.provider import Provider
from engine.runtimes.remote.runtime import RemoteRuntime
from engine.runtimes.remote.target import Target
from tests.engine.runtimes.remote.upstream import Upstream, upstream
from tests.server.fake import FakeDevice

KEY = "sk-a-very-secret-key"


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class World:
    """A runtime with remote models at one provider."""

    def __init__(self, provider: Upstream, clock: Clock, cache_dir: Path) -> None:
        self.upstream = provider
        self.clock = clock
        context = RuntimeContext(FakeDevice(), cache_dir)
        self.runtime = RemoteRuntime(
            context, lambda name: Provider(name, clock=clock, sleep=clock.sleep)
        )
        self.runtime.start()
        self.prepared: Prepared | None = None

    def config(self, task: str = "generate", **options: Any) -> ModelConfig:
        options = {"model": "their-model", "api_key": KEY, **options}
        source = options.pop("source", self.upstream.url)
        return ModelConfig(id="cloud", runtime="remote", task=task, source=source, options=options)

    async def load(self, task: str = "generate", **options: Any) -> tuple[ModelConfig, LoadedModel]:
        config = self.config(task, **options)
        return config, await self.runtime.load(config, lambda reason: None)

    async def run(self, request: Request, task: str = "generate", **options: Any) -> list[Event]:
        """All events of one request."""
        config, loaded = await self.load(task, **options)
        self.prepared = self.runtime.prepare(config, request)
        return [event async for event in loaded.run(self.prepared)]

    @property
    def usage(self) -> Any:
        assert self.prepared is not None
        return self.prepared.usage

    @property
    def provider(self) -> Provider:
        return self.runtime._providers["cloud"]

    @property
    def target(self) -> Target:
        target = self.provider.target("cloud")
        assert target is not None
        return target


def chat(stream: bool = False, **body: Any) -> TextRequest:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "asked", "messages": messages, **body}
    if stream:
        body["stream"] = True
    return TextRequest("asked", TextOperation.CHAT, body, request_id="req-1")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with upstream() as provider:
        found = World(provider, Clock(), tmp_path)
        try:
            yield found
        finally:
            await found.runtime.stop()
