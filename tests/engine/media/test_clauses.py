"""Text cut into clauses while it is written."""

from __future__ import annotations

import pytest

from engine.media.clauses import CLAUSE_CHARS, FIRST_MOST_CHARS, MOST_CHARS, Clauses


def cut(text: str, *, step: int = 3, whole_sentences: bool = False) -> list[str]:
    clauses = Clauses(whole_sentences=whole_sentences)
    found = [c for n in range(0, len(text), step) for c in clauses.feed(text[n : n + step])]
    return found + clauses.finish()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is. And so on. Yes", ["It is.", " And so on.", " Yes"]),
        (
            "Well, this is what I say, and more. So",
            ["Well, this is what I say,", " and more.", " So"],
        ),
        ("Ask Dr. Who, e.g. him. Now ", ["Ask Dr. Who,", " e.g. him.", " Now "]),
        ("1. Go. 2. See. ", ["1. Go.", " 2. See."]),
        ("one\ntwo", ["one\n", "two"]),
        ("  ", []),
    ],
)
def test_ends_of_clauses(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


def test_a_first_clause_without_marks_is_cut_sooner_than_a_later_one() -> None:
    text = "word " * 100
    first, second, *rest = cut(text)
    assert FIRST_MOST_CHARS - 5 <= len(first) <= FIRST_MOST_CHARS
    assert MOST_CHARS - 5 <= len(second) <= MOST_CHARS
    assert first + second + "".join(rest) == text
    assert len(cut(text, whole_sentences=True)[0]) > FIRST_MOST_CHARS


def test_a_later_sentence_is_whole_unless_it_is_long() -> None:
    short = " It rains, it snows."
    long = " " + "It rains and it snows and it blows all over the whole wide land, and so on."
    assert len(short) < CLAUSE_CHARS < long.index(",")
    assert cut("Yes." + short + long) == ["Yes.", short, long[:65], long[65:]]
