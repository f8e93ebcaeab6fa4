"""What a request may take: never less than it does, and near what was seen."""

from __future__ import annotations

from typing import Any

import pytest

from engine.costs.expected import MOST_ATTACHED_TOKENS, MOST_OUTPUT_TOKENS, Expectations, most
from engine.requests import (
    ImageOperation,
    ImageRequest,
    SpeechRequest,
    TextOperation,
    TextRequest,
    TranscriptionRequest,
    VideoRequest,
)
from engine.usage import Usage

CHAT = TextOperation.CHAT
BASE64 = "A" * 10**6


def text(operation: TextOperation = CHAT, **body: Any) -> TextRequest:
    return TextRequest("any", operation, body, "test")


def message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def test_a_prompt_has_no_more_tokens_than_bytes() -> None:
    for words in ("x" * 1000, "é" * 500):
        assert 1000 <= most(text(**message(words)), None).input_tokens < 1100


@pytest.mark.parametrize(
    ("operation", "body", "tokens"),
    [
        (CHAT, {"max_tokens": 10}, 10),
        (CHAT, {"max_tokens": 10, "max_completion_tokens": 20}, 20),
        (CHAT, {"max_completion_tokens": 20, "n": 3}, 60),
        (TextOperation.RESPONSES, {"max_output_tokens": 30}, 30),
        (TextOperation.COMPLETION, {"prompt": ["a", "b"], "max_tokens": 10, "n": 2}, 40),
        (TextOperation.COMPLETION, {"prompt": [1, 2, 3], "max_tokens": 10}, 10),
        (TextOperation.EMBEDDINGS, {"input": "words"}, 0),
        (TextOperation.COUNT_TOKENS, {"max_tokens": 10}, 0),
        (CHAT, {}, MOST_OUTPUT_TOKENS),
        (CHAT, {"max_tokens": "many", "n": -1, "best_of": None, "prompt": {}}, MOST_OUTPUT_TOKENS),
        (CHAT, {"max_tokens": float("inf"), "n": True}, MOST_OUTPUT_TOKENS),
    ],
)
def test_the_limit_of_an_answer(
    operation: TextOperation, body: dict[str, Any], tokens: int
) -> None:
    assert most(text(operation, **body), None).output_tokens == tokens


def test_a_query_is_read_with_each_document() -> None:
    query, documents = "q" * 1000, ["a", "b", {"text": "c"}]
    for one, others in (("query", "documents"), ("text_1", "text_2")):
        body = {one: query, others: documents}
        usage = most(text(TextOperation.RERANK, **body), None)
        assert 3000 < usage.input_tokens < 3200
        assert usage.output_tokens == 0


def test_the_context_bounds_both() -> None:
    usage = most(text(**message("x" * 5000)), 1000)
    assert (usage.input_tokens, usage.output_tokens) == (1000, 1000)
    assert most(text(**message("x"), max_tokens=5000), 1000).output_tokens == 1000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"},
        {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": BASE64},
        },
    ],
)
def test_what_is_attached_counts_as_tokens_not_as_base64(part: dict[str, Any]) -> None:
    tokens = most(text(**message([part])), None).input_tokens
    assert MOST_ATTACHED_TOKENS <= tokens <= 3 * MOST_ATTACHED_TOKENS


@pytest.mark.parametrize(
    "body",
    [
        message(f"data:image/png;base64,{BASE64}"),
        message([{"type": "text", "text": f"data:audio/wav {BASE64}"}]),
        {"prompt": f"data:image/ {BASE64}"},
        {"tools": [{"parameters": {"data": {"description": BASE64}, "format": {}}}]},
    ],
)
def test_a_text_that_looks_attached_counts_as_a_text(body: dict[str, Any]) -> None:
    assert most(text(**body), None).input_tokens >= len(BASE64)


def test_a_deep_body_is_no_trouble() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert most(text(messages=deep), None).input_tokens >= 1


def test_other_requests_have_their_own_units() -> None:
    image = ImageRequest(model="any", operation=ImageOperation.GENERATION, request_id="test", n=4)
    assert most(image, None).images == 4
    speech = SpeechRequest(model="any", text="x" * 100, request_id="test")
    assert most(speech, None).characters == 100
    heard = TranscriptionRequest(model="any", audio=bytes(16_000), request_id="test")
    assert most(heard, None).heard_s == 16.0
    assert Expectations().usage(heard, None).heard_s == pytest.approx(1.0)
    video = VideoRequest(model="any", request_id="test", num_frames=48, fps=24)
    assert most(video, None).video_s == 2.0


def test_what_was_seen_is_expected_next() -> None:
    expectations = Expectations()
    request = text(**message("x" * 1000))
    nbytes = most(request, None).input_tokens
    for _ in range(100):
        usage = Usage(input_tokens=nbytes // 5, output_tokens=40)
        expectations.learn(request, usage, 0.5, remote=True)
    expected = expectations.usage(request, None)
    assert expected.input_tokens == pytest.approx(nbytes / 5, rel=0.02)
    assert expected.output_tokens == 40
    assert expectations.device_s == pytest.approx(0.5)
    assert expectations.usage(text(max_tokens=10), None).output_tokens == 10
