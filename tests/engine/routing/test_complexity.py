"""The score of a request, and what it is made of."""

from __future__ import annotations

from typing import Any

import pytest

from engine.requests import ImageOperation, ImageRequest, TextOperation, TextRequest
from engine.route_config import ComplexityConfig
from engine.routing.complexity import complexity
from engine.routing.prompt_text import prompt_text

WEIGHTS = ComplexityConfig()


def chat(text: Any, **more: Any) -> TextRequest:
    body = {"messages": [{"role": "user", "content": text}], **more}
    return TextRequest("auto", TextOperation.CHAT, body, "r")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Please refactor this function: def f(x): return x", "code"),
        ("Solve the equation x^2 - 5 = 0 and prove it", "mathematics"),
        ("Compare both plans step by step", "reasoning"),
        ("word " * 2000, "length"),
    ],
)
def test_each_sign_raises_its_own_part(text: str, part: str) -> None:
    found = complexity(chat(text), WEIGHTS)
    assert max(found.parts, key=lambda name: found.parts[name]) == part
    assert found.score > 0.4


@pytest.mark.parametrize("text", ["Hello!", "What is the capital of France?", "Say good night."])
def test_small_talk_is_simple(text: str) -> None:
    assert complexity(chat(text), WEIGHTS).score < 0.1


def test_the_parts_add_up_and_stay_below_one() -> None:
    one = complexity(chat("Prove the theorem with an integral"), WEIGHTS).score
    both = complexity(
        chat("Prove the theorem with an integral. Compare, analyse, step by step"), WEIGHTS
    ).score
    assert one < both < 1


def test_a_weight_of_zero_leaves_a_part_out() -> None:
    text = "Prove the theorem with an integral"
    assert complexity(chat(text), ComplexityConfig(mathematics=0)).score < 0.05


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_effort": "high"},
        {"reasoning": {"effort": "high"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ],
)
def test_an_effort_that_is_asked_for_counts(more: dict[str, Any]) -> None:
    assert complexity(chat("Hello", **more), WEIGHTS).parts["reasoning"] == 1
    assert complexity(chat("Hello", reasoning_effort="low"), WEIGHTS).parts["reasoning"] < 0.5


def test_the_words_of_every_dialect_are_found() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert prompt_text(chat(parts)) == "one"
    responses = {"instructions": "two", "input": [{"role": "user", "content": "three"}]}
    assert prompt_text(TextRequest("m", TextOperation.RESPONSES, responses, "r")) == "two\nthree"
    messages = {"system": "four", "messages": [{"role": "user", "content": "five"}]}
    assert prompt_text(TextRequest("m", TextOperation.MESSAGES, messages, "r")) == "four\nfive"
    image = ImageRequest(
        model="m", operation=ImageOperation.GENERATION, request_id="r", prompt="six"
    )
    assert prompt_text(image) == "six"


def test_a_body_of_nonsense_has_no_words() -> None:
    assert prompt_text(TextRequest("m", TextOperation.CHAT, {"messages": 5}, "r")) == ""
    assert prompt_text(chat({"content": [None, 3, {"text": []}]})) == ""
