"""Embeds and ranks texts by the models of the engine, for the key that asked."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.caller import Caller
from engine.config import ModelConfig
from engine.errors import (
    BudgetExceeded,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import Document
from engine.requests import Priority, SchedulingOptions, TextOperation, TextRequest
from server.vector_stores.tokens import Tokens, tokens_of

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.vector_stores.backend import Vectors

TEXTS_AT_ONCE = 64
"""Passages of one request to the model: others have their turn in between."""

TRIES = 8
"""How often passages are sent to a model that takes no more for now."""

QUERY, DOCUMENT = "query", "document"


@dataclass(frozen=True, slots=True)
class Models:
    """The configured models."""

    embedding: str | None
    rerank: str | None


class Embedder:
    """Lives on the event loop."""

    def __init__(
        self, engine: Engine, models: Models, sleep: Callable[[float], Any] = asyncio.sleep
    ) -> None:
        self._engine = engine
        self._models = models
        self._sleep = sleep
        self._tokens: dict[str, Tokens] = {}

    def default_model(self) -> str:
        """The id of the embedding model of new stores.

        Raises:
            InvalidRequest: there is none.

        """
        config = self._engine.config
        if self._models.embedding is not None:
            return config.find(self._models.embedding).id
        found = next((model.id for model in config.models if model.task == "embed"), None)
        if found is None:
            raise InvalidRequest(
                "This server has no embedding model (vector_stores.embedding_model)."
            )
        return found

    @property
    def rerank_model(self) -> str | None:
        """The id of the model that ranks; None: there is none."""
        name = self._models.rerank
        return None if name is None else self._engine.config.find(name).id

    def find(self, name: str) -> ModelConfig:
        """The embedding model of a store.

        Raises:
            Conflict: it is configured no more.

        """
        try:
            return self._engine.config.find(name)
        except ModelNotFound:
            raise Conflict(
                f"The embedding model {name!r} of this vector store is not configured any more."
                " Configure it again, or make a new vector store."
            ) from None

    async def tokens(self, name: str, caller: Caller, priority: Priority) -> Tokens:
        """What is known of the tokens of a model, whose files are brought here if need be.

        Raises:
            EngineError: they cannot be.

        """
        if name not in self._tokens:
            model = self.find(name)
            # A first text brings the files, also for models that are fetched or built.
            if priority is Priority.BATCH:
                await self._embed_patiently(model, ["text"], caller, None)
            else:
                await self._embed(model, ["text"], caller, priority, None)
            self._tokens[name] = await asyncio.to_thread(tokens_of, model, self._engine.config)
        return self._tokens[name]

    async def known_limit(self, name: str) -> int | None:
        """The most tokens that a model reads of a passage, as far as its files are here."""
        model = self.find(name)
        tokens = self._tokens.get(name)
        if tokens is None:
            tokens = await asyncio.to_thread(tokens_of, model, self._engine.config)
        return tokens.max_tokens

    async def queries(self, name: str, texts: Sequence[str], caller: Caller) -> Vectors:
        """The vectors of queries.

        Raises:
            EngineError: see `Engine.open`.

        """
        tokens = await self.tokens(name, caller, Priority.NORMAL)
        role = QUERY if tokens.has_prompts else None
        return await self._embed(self.find(name), texts, caller, Priority.NORMAL, role)

    async def passages(self, name: str, texts: Sequence[str], caller: Caller) -> Vectors:
        """The vectors of passages. They wait for a model that takes no more for now.

        Raises:
            EngineError: see `Engine.open`.

        """
        import numpy as np

        tokens = await self.tokens(name, caller, Priority.BATCH)
        role = DOCUMENT if tokens.has_prompts else None
        model = self.find(name)
        found = []
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[begin : begin + TEXTS_AT_ONCE]
            found.append(await self._embed_patiently(model, part, caller, role))
        return np.concatenate(found)

    async def rank(self, query: str, texts: Sequence[str], caller: Caller) -> list[float]:
        """The relevance of each text to a query, 0 to 1, by the configured model.

        Raises:
            EngineError: see `Engine.open`.

        """
        assert self.rerank_model is not None
        model = self._engine.config.find(self.rerank_model)
        body: dict[str, Any] = {"query": query, "documents": list(texts), "return_documents": False}
        if model.runtime != "remote":
            body["truncation"] = True
        answer = await self._ask(model, TextOperation.RERANK, body, caller, Priority.NORMAL)
        scores = [0.0] * len(texts)
        for result in answer["results"]:
            scores[result["index"]] = min(1.0, max(0.0, float(result["relevance_score"])))
        return scores

    async def _embed_patiently(
        self, model: ModelConfig, texts: Sequence[str], caller: Caller, role: str | None
    ) -> Vectors:
        for left in range(TRIES - 1, -1, -1):
            try:
                return await self._embed(model, texts, caller, Priority.BATCH, role, cuts=True)
            except (BudgetExceeded, ShuttingDown):
                raise
            except Overloaded as error:
                if not left:
                    raise
                await self._sleep(error.retry_after_s)
        raise AssertionError

    async def _embed(
        self,
        model: ModelConfig,
        texts: Sequence[str],
        caller: Caller,
        priority: Priority,
        role: str | None,
        *,
        cuts: bool = False,
    ) -> Vectors:
        import numpy as np

        body: dict[str, Any] = {"input": list(texts)}
        if role is not None:
            body["input_type"] = role
        if cuts and model.runtime == "vllm":
            # A passage was counted as a part of its text: alone it may have a token more.
            body["truncate_prompt_tokens"] = -1
        answer = await self._ask(model, TextOperation.EMBEDDINGS, body, caller, priority)
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = np.array([row["embedding"] for row in rows], np.float32)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if len(vectors) != len(texts) or not np.all(np.isfinite(lengths)) or not lengths.all():
            raise RuntimeFailed(f"{model.id!r} gave no usable embeddings.")
        return np.ascontiguousarray(vectors / lengths)

    async def _ask(
        self,
        model: ModelConfig,
        operation: TextOperation,
        body: dict[str, Any],
        caller: Caller,
        priority: Priority,
    ) -> dict[str, Any]:
        request = TextRequest(
            model.id,
            operation,
            {"model": model.id, **body},
            f"vectors-{uuid.uuid4().hex}",
            SchedulingOptions(priority=priority, caller=caller),
        )
        session = await self._engine.open(request)
        try:
            first, served = session.first, session.model.id
        finally:
            await session.close()
        if served != model.id:  # the vectors of different models cannot be compared
            raise RuntimeFailed(f"{model.id!r} cannot be used, and its fallback is no substitute.")
        if not isinstance(first, Document):
            raise RuntimeFailed(f"{model.id!r} gave no document.")
        answer: dict[str, Any] = json.loads(first.body)
        return answer
