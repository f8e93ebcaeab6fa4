"""Simple facts, and whether an answer has them."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.quality.words import normal_words

FACTS: Mapping[str, tuple[str, ...]] = {
    "What is the capital of France?": ("Paris",),
    "What is the capital of Italy?": ("Rome",),
    "What is two plus two?": ("four", "4"),
    "How many days are in a week?": ("seven", "7"),
    "Which planet do we live on?": ("Earth",),
    "What colour is grass?": ("green",),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
    "Which animal barks?": ("dog", "dogs"),
    "Which ocean is the largest?": ("Pacific",),
    "What is the chemical formula of water?": ("H2O", "H₂O"),
}
"""Questions, and words of which one must be in the answer."""


def is_right(answer: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words is in an answer, whatever else that says."""
    said = normal_words(answer)
    return any(word.lower() in said for word in words)
