"""A model that answers by a script, and calls for searches; vector stores of words beside it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.events import Document, Event
from engine.requests import TextOperation, TextRequest
from server.app import create_app
from server.settings import ServerSettings
from server.vector_store_config import VectorStoreConfig
from tests.server.fake import fake_engine, listening
from tests.server.responses.conftest import USAGE, Sdk, client_of, frame
from tests.server.vector_stores.conftest import EmbeddingRuntime

TRAINS = "Trains stand in the roundhouse. The turntable turns them."
BREAD = "Bread is baked at night. Flour and water make dough."


def call(queries: Any = ("trains",), name: str = "file_search") -> dict[str, Any]:
    """What a model gives to search, or to call a function of the client."""
    arguments = {"queries": queries} if name == "file_search" else {}
    return {"type": "function_call", "name": name, "arguments": json.dumps(arguments)}


def say(text: str) -> dict[str, Any]:
    """What a model gives to say something."""
    return {"type": "message", "text": text}


class ScriptedRuntime(EmbeddingRuntime):
    """Answers each request for a response by the next part of the script."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = self.respond
        self.script: list[list[dict[str, Any]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.errors: dict[int, Exception] = {}
        """By the number of the answer, which begins with 0."""
        self.status = "completed"

    async def respond(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.operation not in (TextOperation.RESPONSES, TextOperation.INPUT_TOKENS):
            async for event in self.embed(request):
                yield event
            return
        number = len(self.bodies)
        body = dict(request.body)
        self.bodies.append(body)
        if request.operation is TextOperation.INPUT_TOKENS:
            yield Document(
                json.dumps({"object": "response.input_tokens", "input_tokens": 1}).encode()
            )
            return
        if number in self.errors:
            raise self.errors[number]
        items = [_item(part, number, at) for at, part in enumerate(self.script[number])]
        response = {
            "id": f"resp_of_the_model_{number}",
            "object": "response",
            "created_at": 1,
            "model": request.model,
            "status": "in_progress",
            "output": [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "usage": None,
        }
        done = {**response, "status": self.status, "output": items, "usage": USAGE}
        if not body.get("stream"):
            yield Document(json.dumps(done).encode())
            return
        for kind in ("response.created", "response.in_progress"):
            yield frame(kind, response=response)
        for index, item in enumerate(items):
            for kind, fields in _events_of(item):
                fields = {"output_index": index, "item_id": item["id"], **fields}
                yield frame(kind, **fields)
        yield frame(f"response.{self.status}", response=done)


def _item(part: dict[str, Any], number: int, at: int) -> dict[str, Any]:
    if part["type"] == "function_call":
        own = {"id": f"fc_{number}_{at}", "call_id": f"call_{number}_{at}", "status": "completed"}
        return {**part, **own}
    text = {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{number}_{at}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [text],
    }


def _events_of(item: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if item["type"] == "function_call":
        arguments = item["arguments"]
        begun = {**item, "arguments": "", "status": "in_progress"}
        middle = [
            ("response.function_call_arguments.delta", {"delta": arguments}),
            (
                "response.function_call_arguments.done",
                {"arguments": arguments, "name": item["name"]},
            ),
        ]
    else:
        part = item["content"][0]
        begun = {**item, "content": [], "status": "in_progress"}
        middle = [
            ("response.content_part.added", {"part": {**part, "text": ""}}),
            ("response.output_text.delta", {"delta": part["text"]}),
            ("response.output_text.done", {"text": part["text"]}),
            ("response.content_part.done", {"part": part}),
        ]
    return [
        ("response.output_item.added", {"item": begun}),
        *middle,
        ("response.output_item.done", {"item": item}),
    ]


@pytest.fixture
def runtime() -> ScriptedRuntime:
    return ScriptedRuntime()


Serving = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serving(runtime: ScriptedRuntime, tmp_path: Path) -> Serving:
    """Serves with the same data folder each time, as after a restart."""
    models = [
        {"id": "small", "source": "none"},
        {"id": "words", "source": "none"},
    ]

    @asynccontextmanager
    async def serve(**settings: Any) -> AsyncIterator[str]:
        engine = fake_engine(
            runtime, tmp_path, models=[{"runtime": "fake", **model} for model in models]
        )
        stores = VectorStoreConfig.model_validate({"embedding_model": "words"})
        app = create_app(engine, ServerSettings(vector_stores=stores, **settings))
        async with listening(app) as url:
            yield url

    return serve


@pytest.fixture
async def sdk(serving: Serving) -> AsyncIterator[Sdk]:
    async with serving() as url, client_of(url) as client:
        yield client


async def filled(sdk: Sdk, **files: str) -> str:
    """The id of a store with these files, by default one about trains and one about bread."""
    store = await sdk.vector_stores.create(name="Yard")
    for name, text in (files or {"trains": TRAINS, "bread": BREAD}).items():
        attached = await sdk.vector_stores.files.upload_and_poll(
            vector_store_id=store.id,
            file=(f"{name}.md", text.encode()),
            poll_interval_ms=10,
            attributes={"about": name},
        )
        assert attached.status == "completed"
    return str(store.id)


def tool(store: str, **more: Any) -> dict[str, Any]:
    """The tool in a request."""
    return {"type": "file_search", "vector_store_ids": [store], **more}
