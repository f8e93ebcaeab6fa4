"""Cuts a text into passages of so many tokens, which overlap."""

from __future__ import annotations

from dataclasses import dataclass

from server.vector_stores.tokens import Spans

MIN_TOKENS = 100
MAX_TOKENS = 4096
AUTO_TOKENS = 800
"""OpenAI's default."""

_PARAGRAPH, _SENTENCE, _WORD = 3, 2, 1
_ENDS = ".!?。！？…।"


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a file is cut."""

    max_tokens: int
    overlap: int
    """Tokens that a passage has in common with the one before it."""

    @classmethod
    def auto(cls, most: int | None) -> Chunking:
        """OpenAI's default, or less for a model that reads at most `most` tokens."""
        size = AUTO_TOKENS if most is None else min(AUTO_TOKENS, most)
        return cls(size, size // 2)


def passages(text: str, spans: Spans, chunking: Chunking) -> list[str]:
    """The passages of a text whose tokens are `spans`.

    A passage ends at a paragraph, a sentence or a word, if there is one in its last quarter.
    """
    found: list[str] = []
    first = 0
    while first < len(spans):
        last = first + chunking.max_tokens
        if last < len(spans):
            last = _cut(text, spans, last - chunking.max_tokens // 4, last)
        else:
            last = len(spans)
        passage = text[spans.begins[first] : spans.ends[last - 1]].strip()
        if passage:
            found.append(passage)
        if last == len(spans):
            break
        first = _begin(spans, max(first + 1, last - chunking.overlap), last)
    return found


def _cut(text: str, spans: Spans, least: int, most: int) -> int:
    """The best number of tokens to end a passage after, from `least` to `most`."""
    best, quality = most, 0
    for end in range(most, max(least, 1) - 1, -1):
        here = _quality(text, spans.ends[end - 1], spans.begins[end])
        if here > quality:
            best, quality = end, here
            if quality == _PARAGRAPH:
                break
    return best


def _quality(text: str, end: int, begin: int) -> int:
    """How good it is to cut between two tokens."""
    between = text[end:begin]
    if "\n\n" in between:
        return _PARAGRAPH
    if between.strip() or not between:
        return 0
    return _SENTENCE if text[end - 1] in _ENDS else _WORD


def _begin(spans: Spans, first: int, last: int) -> int:
    """The first token from `first` on that begins a word; `first` if there is none until `last`."""
    for index in range(first, last):
        if spans.ends[index - 1] < spans.begins[index]:
            return index
    return first
