"""Every answer of a language model says how many tokens of the prompt its prefix cache had."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.events import Document, Frame
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.usage import Usage
from tests.engine.conftest import MakeModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

CHAT, COMPLETION = TextOperation.CHAT, TextOperation.COMPLETION
RESPONSES, MESSAGES = TextOperation.RESPONSES, TextOperation.MESSAGES

numbers = itertools.count()

Served = tuple[VllmRuntime, ModelConfig, VllmModel]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(vllm_runtime: VllmRuntime, make_model: MakeModel) -> AsyncIterator[Served]:
    model = make_model("counted", max_model_len=2048)
    loaded = await vllm_runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    yield vllm_runtime, model, loaded
    await vllm_runtime.unload(loaded)


def long() -> str:
    """Two blocks and more, which nothing has asked for before."""
    return f"{next(numbers)} times the sea and the sky and the ships that go by. " * 24


def body_of(operation: TextOperation, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    match operation:
        case TextOperation.COMPLETION:
            return {"prompt": text, "max_tokens": 4}
        case TextOperation.RESPONSES:
            return {"input": text, "max_output_tokens": 4, "prompt_cache_key": "app"}
        case TextOperation.MESSAGES:
            return {"messages": messages, "max_tokens": 4}
    hints = {"prompt_cache_key": "app", "prompt_cache_retention": "24h", "safety_identifier": "u"}
    return {"messages": messages, "max_tokens": 4, **hints}


async def answered(
    served: Served, operation: TextOperation, body: Mapping[str, Any]
) -> tuple[list[Any], Usage]:
    """The documents of an answer, one or those of all events, and what was counted."""
    runtime, model, loaded = served
    request = TextRequest(model.id, operation, {"model": model.id, **body}, request_id="r")
    prepared = runtime.prepare(model, request)
    found = []
    async for event in loaded.run(prepared):
        if isinstance(event, Document):
            found.append(json.loads(event.body))
        else:
            assert isinstance(event, Frame)
            data = event.data[event.data.index("data: ") + 6 :].strip()
            if data != "[DONE]":
                found.append(json.loads(data))
    return found, prepared.usage


def usage_of(operation: TextOperation, documents: list[Any]) -> tuple[int, int]:
    """Input tokens, and those of them that were cached, as the answer says."""
    if operation is RESPONSES:
        usage = documents[-1].get("response", documents[-1])["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    usage = next(each["usage"] for each in reversed(documents) if each.get("usage"))
    if operation is MESSAGES:
        cached = usage["cache_read_input_tokens"]
        assert usage["cache_creation_input_tokens"] == 0
        return usage["input_tokens"] + cached, cached
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
@pytest.mark.parametrize("operation", [CHAT, COMPLETION, RESPONSES, MESSAGES])
async def test_the_second_time_a_prompt_is_cached(
    served: Served, operation: TextOperation, stream: bool
) -> None:
    body = body_of(operation, long()) | {"stream": stream}
    if stream and operation in (CHAT, COMPLETION):
        body["stream_options"] = {"include_usage": True}
    tokens = []
    for cached in (False, True):
        documents, counted = await answered(served, operation, body)
        said = usage_of(operation, documents)
        assert said == (counted.input_tokens, counted.cached_tokens)
        assert (said[1] > 200) == cached and said[1] < said[0]
        tokens.append(said[0])
        if stream and operation is MESSAGES:
            assert documents[0]["type"] == "message_start"
            assert usage_of(operation, [documents[0]["message"]]) == said
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_the_cached_tokens_of_several_prompts_are_added(served: Served, stream: bool) -> None:
    prompts = [long(), long()]
    body = {"prompt": prompts[0], "max_tokens": 4}
    await answered(served, COMPLETION, body)
    one = usage_of(COMPLETION, (await answered(served, COMPLETION, body))[0])[1]
    body = {"prompt": prompts, "max_tokens": 4, "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    await answered(served, COMPLETION, body)
    documents, counted = await answered(served, COMPLETION, body)
    assert usage_of(COMPLETION, documents) == (counted.input_tokens, 2 * one)
