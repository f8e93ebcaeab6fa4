"""A model that answers as the Responses API has it, behind a server on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import openai
import pytest

from engine.errors import EngineError
from engine.events import Document, Event, Frame
from engine.requests import TextOperation, TextRequest
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening


def texts_of(items: Any) -> list[str]:
    """What each item of an input says."""
    found = []
    for item in items if isinstance(items, list) else [{"content": items}]:
        content = item.get("content", item.get("output", item.get("name")))
        parts = content if isinstance(content, list) else [{"text": content}]
        found.append("".join(str(part.get("text")) for part in parts))
    return found


class Model:
    """Says `answer 1`, `answer 2` and so on; or calls the tool that it has and was not given."""

    def __init__(self) -> None:
        self.count = 0
        self.inputs: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.requests: list[TextRequest] = []
        self.go_on = asyncio.Event()
        """Cleared, it stops in the middle of an answer."""
        self.go_on.set()
        self.begun = asyncio.Event()
        self.left = asyncio.Event()
        """Set once it was stopped there."""
        self.error: EngineError | None = None
        self.status = "completed"

    async def __call__(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        body = dict(request.body)
        self.bodies.append(body)
        self.inputs.append(texts_of(body.get("input")))
        if request.operation is TextOperation.INPUT_TOKENS:
            count = sum(map(len, self.inputs[-1]))
            document = {"object": "response.input_tokens", "input_tokens": count}
            yield Document(json.dumps(document).encode())
            return
        self.count += 1
        response = {
            "id": f"resp_of_the_model_{self.count}",
            "object": "response",
            "created_at": 1,
            "model": request.model,
            "status": "in_progress",
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "output": [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "usage": None,
        }
        item = self._item(body)
        streams = bool(body.get("stream"))
        if streams:
            for kind in ("response.created", "response.in_progress"):
                yield frame(kind, response=response)
            begun = {**item, "content": []} if item["type"] == "message" else item
            yield frame("response.output_item.added", output_index=0, item=begun)
            if item["type"] == "message":
                text = item["content"][0]["text"]
                yield frame("response.output_text.delta", item_id=item["id"], delta=text)
        self.begun.set()
        try:
            await self.go_on.wait()
        except BaseException:
            self.left.set()
            raise
        if self.error is not None:
            raise self.error
        response |= {"status": self.status, "output": [item], "usage": USAGE}
        if streams:
            yield frame("response.output_item.done", output_index=0, item=item)
            yield frame(f"response.{self.status}", response=response)
        else:
            yield Document(json.dumps(response).encode())

    def _item(self, body: dict[str, Any]) -> dict[str, Any]:
        items = body.get("input")
        last = items[-1] if isinstance(items, list) and items else {}
        if body.get("tools") and last.get("type") != "function_call_output":
            return {
                "id": f"fc_{self.count}",
                "type": "function_call",
                "call_id": f"call_{self.count}",
                "name": body["tools"][0]["name"],
                "arguments": "{}",
                "status": "completed",
            }
        part = {
            "type": "output_text",
            "text": f"answer {self.count}",
            "annotations": [],
            "logprobs": [],
        }
        return {
            "id": f"msg_{self.count}",
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": [part],
        }


USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 5,
}


def frame(kind: str, **fields: Any) -> Frame:
    document = {"type": kind, "sequence_number": 0, "content_index": 0, "logprobs": [], **fields}
    document.setdefault("output_index", 0)
    return Frame(f"event: {kind}\ndata: {json.dumps(document)}\n\n")


@pytest.fixture
def model(runtime: FakeRuntime) -> Model:
    model = Model()
    runtime.answer = model
    return model


Serving = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serving(model: Model, runtime: FakeRuntime, tmp_path: Path) -> Serving:
    """Serves with the same data folder each time, as after a restart."""

    @asynccontextmanager
    async def serve(settings: ServerSettings | None = None) -> AsyncIterator[str]:
        engine = fake_engine(runtime, tmp_path)
        app = create_app(engine, settings or ServerSettings())
        async with listening(app) as url:
            yield url

    return serve


LIMIT_S = 60.0
"""More than any answer or change takes here, also on a busy machine."""

Sdk: TypeAlias = Any
"""The official client. An item has one of thirty types for it, and few of those have a content."""


def client_of(url: str, key: str = "none") -> Sdk:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=LIMIT_S)


@pytest.fixture
async def sdk(serving: Serving) -> AsyncIterator[Sdk]:
    async with serving() as url, client_of(url) as client:
        yield client
