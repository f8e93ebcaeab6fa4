"""Words that were heard, against words that were said."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jiwer

_TITLES = {"mr": "mister", "mrs": "missis", "dr": "doctor"}


def normal_words(text: str) -> list[str]:
    """The words of a text without case and punctuation; titles are written out."""
    words = re.sub(r"[^\w\s]", "", re.sub(r"[-–—]", " ", text.lower())).split()
    return [_TITLES.get(word, word) for word in words]


def word_errors(said: Sequence[str], heard: Sequence[str]) -> tuple[int, int]:
    """Substitutions, deletions and insertions, and the number of words that were said.

    Raises:
        ValueError: the two have not as many texts as each other, or a said one has no word.

    """
    found = jiwer.process_words(
        [" ".join(normal_words(text)) for text in said],
        [" ".join(normal_words(text)) for text in heard],
    )
    errors = found.substitutions + found.deletions + found.insertions
    return errors, found.hits + found.substitutions + found.deletions


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """The errors of `word_errors` as a share of the words that were said."""
    errors, words = word_errors(said, heard)
    return errors / words


def matched_words(said: Sequence[str], heard: Sequence[str]) -> list[tuple[int, int]]:
    """The places of equal words: an index in `said` and one in `heard` for each."""
    alignment = jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]
    return [
        (part.ref_start_idx + step, part.hyp_start_idx + step)
        for part in alignment
        if part.type == "equal"
        for step in range(part.ref_end_idx - part.ref_start_idx)
    ]
