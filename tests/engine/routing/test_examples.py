"""Prompts compared with examples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.requests import TextOperation, TextRequest
from engine.route_config import ComplexityConfig, ExamplesConfig
from engine.routing.complexity import complexity
from engine.routing.examples import Examples, Vector

CONFIG = ExamplesConfig(model="embed", simple=("hi", "thanks"), hard=("prove it",), weight=0.5)
VECTORS = {"hi": (1.0, 0.0), "thanks": (0.9, 0.1), "prove it": (0.0, 2.0), "nothing": (0.0, 0.0)}


class Embedder:
    """Knows the vectors above; all other texts are between."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    async def __call__(self, model: str, texts: Sequence[str]) -> list[Vector]:
        self.calls.append((model, list(texts)))
        return [VECTORS.get(text, (1.0, 1.0)) for text in texts]


async def test_the_nearest_example_decides() -> None:
    examples = Examples(CONFIG, Embedder())
    assert await examples.likeness("prove it") > 0.99
    assert await examples.likeness("hi") < 0.01
    assert 0.1 < await examples.likeness("between") < 0.5  # "thanks" is a little nearer
    assert await examples.likeness("nothing") == pytest.approx(0.5)


async def test_examples_are_embedded_once_and_long_prompts_are_cut() -> None:
    embed = Embedder()
    examples = Examples(CONFIG, embed)
    await examples.likeness("a" * 10_000)
    await examples.likeness("hi")
    assert embed.calls[0] == ("embed", ["hi", "thanks", "prove it"])
    assert [len(texts) for _, texts in embed.calls] == [3, 1, 1]
    assert len(embed.calls[1][1][0]) == 2000


def test_the_likeness_is_a_part_of_the_score() -> None:
    request = TextRequest("auto", TextOperation.CHAT, {"messages": []}, "r")
    with_examples = ComplexityConfig(examples=CONFIG)
    assert complexity(request, with_examples, 1.0).score == pytest.approx(0.5)
    assert complexity(request, with_examples, 1.0).parts["examples"] == 1.0
    assert "examples" not in complexity(request, with_examples).parts
    assert complexity(request, ComplexityConfig(), 1.0).score == 0
