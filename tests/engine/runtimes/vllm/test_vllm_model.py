"""Answers of vLLM's serving classes: errors in a stream are errors, whatever they look like."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import EngineError, InvalidRequest, RuntimeFailed
from engine.events import Event, Frame
from engine.requests import TextOperation, TextRequest
from engine.runtimes.base import Prepared
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.options import VllmOptions

pytestmark = pytest.mark.slow  # a run of a text model imports vLLM


def data(document: Any) -> str:
    return f"data: {json.dumps(document)}\n\n"


WORD = data({"choices": [{"delta": {"content": "one"}}]})
ABOUT_ERRORS = data(
    {
        "choices": [
            {
                "delta": {"content": 'it says "error"'},
                "logprobs": {"content": [{"token": "error", "bytes": None}]},
            }
        ]
    }
)
FAILED = data({"error": {"message": "no more", "type": "InternalServerError", "code": 500}})
REFUSED = data({"error": {"message": "too long", "type": "BadRequest", "code": 400, "param": "n"}})
LONG_ID = data({"id": "x" * 100, "error": {"message": "too long", "code": 400, "param": "n"}})
BROKEN_MESSAGE = "event: error\n" + data(
    {"type": "error", "error": {"type": "internal_error", "message": "no more"}}
)


def model(*frames: str) -> VllmModel:
    """A model whose chat answers with these frames."""

    async def stream() -> AsyncGenerator[str, None]:
        for frame in frames:
            yield frame

    async def create(_: Any) -> AsyncGenerator[str, None]:
        return stream()

    client = SimpleNamespace(parked=frozenset(), error=None)
    memory: Any = None
    made = VllmModel(SimpleNamespace(engine_core=client), memory, VllmOptions())
    made.serving = SimpleNamespace(
        openai_serving_chat=SimpleNamespace(create_chat_completion=create)
    )
    return made


async def events(made: VllmModel) -> tuple[list[Event], EngineError | None]:
    request = TextRequest("m", TextOperation.CHAT, {"n": 9}, request_id="r")
    got: list[Event] = []
    try:
        async for event in made.run(Prepared(request, None)):
            got.append(event)
    except EngineError as error:
        return got, error
    return got, None


@pytest.mark.parametrize("before", [[], [WORD]])
@pytest.mark.parametrize("frame", [FAILED, BROKEN_MESSAGE])
async def test_a_stream_that_breaks_ends_with_our_error(before: list[str], frame: str) -> None:
    got, error = await events(model(*before, frame, "data: [DONE]\n\n"))
    assert got == [Frame(each) for each in before]
    assert isinstance(error, RuntimeFailed)
    assert error.message == "no more"


@pytest.mark.parametrize("before", [[], [WORD]])
@pytest.mark.parametrize("frame", [REFUSED, LONG_ID])
async def test_a_refusal_in_a_stream_is_a_refusal(before: list[str], frame: str) -> None:
    got, error = await events(model(*before, frame))
    assert got == [Frame(each) for each in before]
    assert isinstance(error, InvalidRequest)
    assert error.param == "n"


async def test_an_answer_about_errors_is_no_error() -> None:
    assert await events(model(ABOUT_ERRORS, WORD)) == ([Frame(ABOUT_ERRORS), Frame(WORD)], None)
