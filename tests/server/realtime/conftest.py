"""A server whose three models are fakes behind the real engine, and OpenAI's own client of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openai
import pytest
from openai.resources.realtime.realtime import AsyncRealtimeConnection

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event, Frame, Heard, Segment, Speech
from engine.requests import Request, SpeechRequest, TextRequest, TranscriptionRequest
from engine.runtimes.registry import REGISTRY
from tests.server.fake import FakeRuntime, fake_engine

RATE = 24_000


class Voices(FakeRuntime):
    """Speaks a tenth of a second for each word, hears what it is told, and answers as told."""

    tasks: ClassVar[tuple[str, ...]] = ("generate", "speech", "transcribe")

    def __init__(self) -> None:
        super().__init__()
        self.answer = self.react
        self.heard = "hello there"
        self.words = ["Well, ", "this is ", "what I say. ", "And more."]
        self.calls: list[dict[str, Any]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.may_speak_on = asyncio.Event()
        self.may_speak_on.set()
        self.finish = "stop"
        self.deaf = False
        self.ended: list[str] = []
        """The kinds of runs that have ended."""

    async def react(self, request: Request) -> AsyncGenerator[Event, None]:
        try:
            if isinstance(request, TextRequest):
                async for event in self._chat():
                    yield event
            elif isinstance(request, SpeechRequest):
                count = len(request.text.split())
                yield Speech(np.full(count * RATE // 10, 0.25, np.float32), RATE)
                await self.may_speak_on.wait()
            elif isinstance(request, TranscriptionRequest):
                if self.deaf:
                    raise RuntimeFailed("It is deaf.")
                yield Heard("en", 1.0)
                yield Segment(0, 0.0, 1.0, self.heard, 0, (), 0.0, 0.0, 1.0, 0.0)
        finally:
            self.ended.append(type(request).__name__)

    async def _chat(self) -> AsyncGenerator[Event, None]:
        for index, call in enumerate(self.calls):
            yield _frame({"tool_calls": [{"index": index, **call}]})
        for word in [] if self.calls else self.words:
            yield _frame({"content": word})
            await self.may_go_on.wait()
        yield _frame({}, "tool_calls" if self.calls and self.finish == "stop" else self.finish)
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        yield Frame(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        yield Frame("data: [DONE]\n\n")


def _frame(delta: dict[str, Any], finish: str | None = None) -> Frame:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return Frame(f"data: {json.dumps({'choices': [choice]})}\n\n")


MODELS: list[dict[str, Any]] = [
    {"id": "chat", "aliases": ["gpt-realtime"], "source": "none"},
    {"id": "ears", "task": "transcribe", "source": "none"},
    {"id": "voice", "task": "speech", "source": "none"},
    {"id": "huge", "source": "none", "options": {"nbytes": 100_000}},
    {"id": "big", "task": "speech", "source": "none", "options": {"nbytes": 100_000}},
]


@pytest.fixture
def voices(monkeypatch: pytest.MonkeyPatch) -> Voices:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.realtime.conftest:Voices")
    return Voices()


@pytest.fixture
def engine(voices: Voices, tmp_path: Path) -> Engine:
    models = [{"runtime": "fake", **model} for model in MODELS]
    return fake_engine(voices, tmp_path, models=models)


class Talk:
    """A connection, and all events that came."""

    def __init__(self, connection: AsyncRealtimeConnection) -> None:
        self.connection = connection
        self.events: list[Any] = []

    async def until(self, *kinds: str) -> Any:
        """The next event of one of these kinds."""
        async with asyncio.timeout(20):
            while True:
                event = await self.connection.recv()
                self.events.append(event)
                if event.type in kinds:
                    return event

    def kinds(self) -> list[str]:
        return [event.type for event in self.events]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.type == kind]

    async def update(self, **session: Any) -> Any:
        await self.connection.send({"type": "session.update", "session": session})  # type: ignore[arg-type]
        return await self.until("session.updated", "error")

    async def say(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        await self.connection.send({"type": "conversation.item.create", "item": item})  # type: ignore[arg-type]
        await self.until("conversation.item.done")


@asynccontextmanager
async def talking(url: str, key: str = "none", **query: str | None) -> AsyncIterator[Talk]:
    """A conversation through OpenAI's own client. With a model of None the address names none."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    query = query or {"model": "gpt-realtime"}
    model = query.pop("model", None) or openai.omit
    async with client.realtime.connect(model=model, extra_query=dict(query)) as connection:
        talk = Talk(connection)
        await talk.until("session.created")
        yield talk


@pytest.fixture
async def talk(url: str) -> AsyncIterator[Talk]:
    async with talking(url) as talk:
        yield talk
