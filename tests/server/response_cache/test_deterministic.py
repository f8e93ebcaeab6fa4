"""Which requests have one answer."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import ModelConfig
from engine.requests import (
    ImageOperation,
    ImageRequest,
    Request,
    SpeechRequest,
    TextOperation,
    TextRequest,
    VideoRequest,
)
from server.response_cache.deterministic import is_deterministic, upload_bytes

KOKORO = ModelConfig(id="kokoro", runtime="kokoro", task="speech", source="a/b")
BARK = ModelConfig(id="bark", runtime="bark", task="speech", source="a/b")


def text(operation: TextOperation = TextOperation.CHAT, **body: Any) -> Request:
    return TextRequest("any", operation, body, "id")


def speech(seed: int | None = None) -> Request:
    return SpeechRequest(model="any", text="Hello", request_id="id", seed=seed)


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (text(temperature=0), True),
        (text(temperature=0.0), True),
        (text(temperature=0, n=2), True),
        (text(seed=0), True),
        (text(seed=5, temperature=2), True),
        (text(), False),
        (text(temperature=0.01), False),
        (text(temperature=None, seed=None), False),
        (text(temperature="0"), False),
        (text(seed=True), False),
        (text(temperature=0, store=False), True),
        (text(temperature=0, store=True), False),
        (text(temperature=0, background=True), False),
        (text(temperature=0, conversation="conv_1"), False),
        (text(temperature=0, web_search_options={"a": 1}), False),
        (text(temperature=0, mcp_servers=[{}]), False),
        (text(temperature=0, tools=[FUNCTION]), True),
        (text(temperature=0, tools=[{"name": "f", "input_schema": {}}]), True),
        (text(temperature=0, tools=[FUNCTION, {"type": "web_search"}]), False),
        (text(temperature=0, tools=["odd"]), False),
        (text(TextOperation.COMPLETION, temperature=0, prompt="once"), True),
        (text(TextOperation.RESPONSES, temperature=0, prompt={"id": "pmpt_1"}), False),
        (text(TextOperation.EMBEDDINGS, input="a"), True),
        (text(TextOperation.RERANK, query="a", documents=["b"]), True),
        (text(TextOperation.MODERATION, input="a"), True),
        (text(TextOperation.FILL_MASK, inputs="a"), True),
        (text(TextOperation.TOKENIZE, prompt="a", temperature=0), False),
        (text(TextOperation.COUNT_TOKENS, temperature=0), False),
        (speech(), False),
        (speech(1), True),
        (ImageRequest(model="m", operation=ImageOperation.EDIT, request_id="", seed=0), True),
        (ImageRequest(model="m", operation=ImageOperation.EDIT, request_id=""), False),
        (VideoRequest(model="m", request_id="", seed=0), False),
    ],
)
def test_which_are(request_: Request, expected: bool) -> None:
    assert is_deterministic(request_, (BARK,)) is expected


def test_speech_of_a_runtime_that_repeats_itself() -> None:
    assert is_deterministic(speech(), (KOKORO,))
    assert not is_deterministic(speech(), (KOKORO, BARK))


def test_bytes_of_a_form() -> None:
    assert upload_bytes({"a": "text", "b": b"12", "c": [b"345"], "d": [{"e": b"6"}]}) == 6
