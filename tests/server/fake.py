"""A runtime without a library, behind the real interface; the engine around it is the real one."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import LoadFailed
from engine.events import Document, Event, Frame
from engine.files.hub.selection import HubSource
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.requests import Request, TextRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.section import Section
from server.websocket.protocol import websocket_options

MODEL_BYTES = 1000
DEVICE_BYTES = 10_000


class FakeDevice(Device):
    kind: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        self.name = "fake device"
        self.total_bytes = DEVICE_BYTES

    def external_bytes(self) -> int:
        return 0

    def own_bytes(self) -> int:
        return 0

    def release_cached(self) -> None:
        pass


class FakeOptions(Section):
    nbytes: int = MODEL_BYTES
    error: str | None = None


Answer = Callable[[Any], AsyncGenerator[Event, None]]
"""What a test puts in the place of a library; it knows which kind of request it sends."""


async def echo(request: TextRequest) -> AsyncGenerator[Event, None]:
    """The request as a document, or three frames where a stream was asked for."""
    if not request.body.get("stream"):
        yield Document(json.dumps({"operation": request.operation, **request.body}).encode())
        return
    for word in ("one", "two"):
        yield Frame(f'data: {{"word": "{word}"}}\n\n')
    yield Frame("data: [DONE]\n\n")


class FakeLoaded(LoadedModel):
    def __init__(self, model: ModelConfig, runtime: FakeRuntime) -> None:
        self._nbytes = runtime.options(model).nbytes
        self._runtime = runtime

    def blocks(self) -> tuple[Block, ...]:
        return (Block("weights", self._nbytes),)

    @property
    def max_concurrency(self) -> int:
        return 1

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        self._runtime.requests.append(prepared.request)
        events = self._runtime.answer(prepared.request)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


class FakeRuntime(Runtime):
    name: ClassVar[str] = "fake"
    tasks: ClassVar[tuple[str, ...]] = ("generate",)
    Options: ClassVar[type[Section]] = FakeOptions

    def __init__(self, context: RuntimeContext | None = None) -> None:
        self.answer: Answer = echo
        self.requests: list[Any] = []
        self.may_start = threading.Event()
        self.may_start.set()
        self.start_error: Exception | None = None

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        return super().hub_sources(model) if "/" in model.source else ()

    def options(self, model: ModelConfig) -> FakeOptions:
        found = model.options_as(self.Options)
        assert isinstance(found, FakeOptions)
        return found

    def start(self) -> None:
        self.may_start.wait(60)
        if self.start_error is not None:
            raise self.start_error

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        return Prepared(request, None)

    def estimate(self, model: ModelConfig) -> Estimate:
        return Estimate((Block("weights", self.options(model).nbytes),), 0.1)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        options = self.options(model)
        if options.error is not None:
            raise LoadFailed(options.error)
        return FakeLoaded(model, self)

    async def unload(self, loaded: LoadedModel) -> None:
        pass


def fake_engine(runtime: FakeRuntime, state_dir: Path, **config: object) -> Engine:
    """A real engine with four models: `small`, `other`, one too `big`, one `broken`."""
    models: list[dict[str, object]] = [
        {"id": "small", "aliases": ["gpt-4o", "org/small"], "source": "none"},
        {"id": "other", "source": "none", "keep_alive": "forever"},
        {"id": "big", "source": "none", "options": {"nbytes": 10 * DEVICE_BYTES}},
        {"id": "broken", "source": "none", "options": {"error": "the file is torn"}},
    ]
    raw = {
        "memory": DEVICE_BYTES,
        "state_dir": state_dir,
        "data_dir": state_dir / "data",
        "models": [{"runtime": "fake", **model} for model in models],
        **config,
    }
    return Engine(
        EngineConfig.model_validate(raw), device=FakeDevice(), runtimes={"fake": lambda _: runtime}
    )


@asynccontextmanager
async def listening(
    app: ASGIApp,
    http: type[asyncio.Protocol] | None = None,
    *,
    write_timeout_s: float = 60,
    max_message: int = 2**20,
) -> AsyncIterator[str]:
    """The application behind real sockets on loopback; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=http or "auto",
        **websocket_options(write_timeout_s, max_message),
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    # Not serve(): it would take the signals of the test process, and looks only ten times a second
    # whether it should stop.
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    assert server.started
    await server.on_tick(0)  # writes the headers of every answer
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await server.shutdown(sockets=[listener])
