"""Greedy completions: the same request always has the same answer."""

from __future__ import annotations

import json
from typing import Any

from engine.config import ModelConfig
from engine.events import Event, Frame
from engine.requests import TextOperation, TextRequest
from engine.runtimes.base import LoadedModel, Runtime

PROMPTS = (
    "hello",
    "a long prompt about the sea and the sky",
    "x",
    "the quick brown fox jumps over the lazy dog again and again",
)


def completion(model_id: str, prompt: str, *, max_tokens: int = 48, **more: Any) -> TextRequest:
    """A streamed completion that runs to `max_tokens`."""
    body = {
        "model": model_id,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **more,
    }
    return TextRequest(
        model=model_id, operation=TextOperation.COMPLETION, body=body, request_id="test"
    )


def text_of(frame: Event) -> str:
    """The text in one chunk of a completion."""
    assert isinstance(frame, Frame)
    data = frame.data.removeprefix("data: ").strip()
    return "" if data == "[DONE]" else str(json.loads(data)["choices"][0]["text"])


async def answer(
    runtime: Runtime, model: ModelConfig, loaded: LoadedModel, prompt: str, max_tokens: int = 48
) -> str:
    """The whole text of one completion, straight from the runtime."""
    prepared = runtime.prepare(model, completion(model.id, prompt, max_tokens=max_tokens))
    text = ""
    async for event in loaded.run(prepared):
        assert isinstance(event, Frame)
        text += text_of(event)
    return text
