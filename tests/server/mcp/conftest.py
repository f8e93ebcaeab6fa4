from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from engine.config import ModelConfig
from engine.engine import Engine
from engine.events import Document, Event, Heard, ImageResult, Segment, Speech, VideoResult
from engine.requests import (
    ImageRequest,
    Request,
    SpeechRequest,
    TextRequest,
    TranscriptionRequest,
    VideoRequest,
)
from engine.runtimes.base import Prepared
from engine.runtimes.registry import REGISTRY
from engine.usage import Usage
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.keys.conftest import add_key, store  # noqa: F401 - fixtures

RATE = 24_000
TASKS = ("generate", "embed", "rerank", "image", "video", "speech", "transcribe")

Connect = Callable[..., AbstractAsyncContextManager[Client]]


async def work(request: Request) -> AsyncGenerator[Event, None]:
    """A small answer of every kind of model."""
    if isinstance(request, ImageRequest):
        if request.prompt == "noise":
            noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
            yield ImageResult((Image.fromarray(noise),) * request.n, request.seed)
        else:
            image = Image.new("RGB", (request.width or 64, request.height or 64), (255, 0, 0))
            yield ImageResult((image,) * request.n, request.seed or 7)
    elif isinstance(request, VideoRequest):
        frames = np.zeros((6, 64, 64, 3), np.uint8)
        frames[..., 0] = 255
        yield VideoResult(frames, 6, 0)
    elif isinstance(request, SpeechRequest):
        seconds = 60 if request.text == "long" else 1
        yield Speech(np.zeros(seconds * RATE, np.float32), RATE)
    elif isinstance(request, TranscriptionRequest):
        yield Heard("en", 1.0)
        yield Segment(0, 0.0, 1.0, f" {len(request.audio)} bytes", 0, (), 0.0, 0.0, 1.0, 0.0)
    else:
        assert isinstance(request, TextRequest)
        yield Document(json.dumps(_text(request)).encode())


def _text(request: TextRequest) -> dict[str, Any]:
    if request.operation == "embeddings":
        length = request.body.get("dimensions", 3)
        given = request.body["input"]
        count = len(given) if isinstance(given, list) else 1
        rows = [{"index": each, "embedding": [0.5] * length} for each in range(count)]
        return {"data": rows, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    if request.operation == "rerank":
        return {"results": [{"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}]}
    said = request.body["messages"]
    return {
        "model": request.model,
        "choices": [{"message": {"content": json.dumps(said)}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


class StudioRuntime(FakeRuntime):
    """A fake that does everything."""

    tasks: ClassVar[tuple[str, ...]] = TASKS

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if isinstance(request, VideoRequest):
            request = replace(request, fps=6, num_frames=6, width=64, height=64)
        return Prepared(request, None, usage=Usage(input_tokens=3, output_tokens=4))


@pytest.fixture(autouse=True)
def studio_registered(fake_registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.mcp.conftest:StudioRuntime")


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = StudioRuntime()
    runtime.answer = work
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    models = [
        {"id": task, "source": "none", "runtime": "fake", "task": task, "options": {"nbytes": 6000}}
        for task in TASKS
    ]
    models.append({**models[3], "id": "second-image"})
    address = {"source": "http://127.0.0.1:9/v1", "options": {"model": "a"}}
    models.append({"id": "cloud", "runtime": "remote", **address})
    return fake_engine(runtime, tmp_path, models=models)


@pytest.fixture
def connect(url: str) -> Connect:
    """Connects the official client, with a key or without, by the newest protocol or an older."""

    @asynccontextmanager
    async def connected(
        key: str | None = None, *, mode: str = "auto", **headers: str
    ) -> AsyncIterator[Client]:
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            transport = streamable_http_client(f"{url}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                yield client

    return connected
