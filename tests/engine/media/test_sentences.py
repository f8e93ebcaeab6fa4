"""Splitting texts into sentences: what ends one, what does not, and what is too long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.media.sentences import split_sentences

EXAMPLES = [
    ("en", ["Hello there.", "How are you?", "Fine!"]),
    ("en", ["Dr. Smith paid $3.50 at 5 p.m. on Jan. 5th.", "He left."]),
    ("en", ["Mr. J. R. R. Tolkien wrote it.", "Version 3.5.1 is out!", "See Fig. 3 and pp. 3-5."]),
    ("en", ["Take fruit, e.g. Apples or pears.", "The rest, i.e. The nuts, can wait."]),
    ("en", ['"Is it true?" she asked.', "It cost £1,000.50!", "In 1999.", "Yes."]),
    ("en", ["1. First item.", "2. Second item."]),
    ("en-gb", ["St. John met Prof. Lee.", "The U.S. Army came."]),
    ("es", ["Hola Sr. García.", "¿Cómo estás?", "Bien."]),
    ("fr", ["M. Dupont et Mme. Petit sont là.", "Il dort."]),
    ("pt-br", ["O Sr. Silva e a Dra. Costa.", "Bom."]),
    ("hi", ["नमस्ते।", "आप कैसे हैं?"]),
    ("de", ["Dr. Müller kam am 3. Mai.", "Das war es."]),
    ("xx", ["Some words.", "In no language."]),
]


@pytest.mark.parametrize(("language", "sentences"), EXAMPLES)
def test_sentences_end_where_they_end(language: str, sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences), language, max_chars=400) == sentences


def test_sentences_without_spaces_between() -> None:
    found = split_sentences("こんにちは。元気ですか?はい。", "ja", max_chars=400)
    assert found == ["こんにちは。", "元気ですか?", "はい。"]


def test_white_space_is_one_space_and_an_empty_line_is_an_end() -> None:
    text = "  A title\n \nOne  line\nand\tanother.\r\n\r\nThe end\n"
    found = split_sentences(text, "en", max_chars=400)
    assert found == ["A title", "One line and another.", "The end"]


def test_what_says_nothing_goes_with_what_does() -> None:
    assert split_sentences("Wait. ... !!! Go.", "en", max_chars=400) == ["Wait. ... !!!", "Go."]
    assert split_sentences(" \n\n\t", "en", max_chars=400) == []
    assert split_sentences("", "en", max_chars=400) == []


def test_a_long_sentence_is_cut_at_commas_then_spaces_then_anywhere() -> None:
    assert split_sentences("one two, three 1,000 four five", "en", max_chars=22) == [
        "one two,",
        "three 1,000 four five",
    ]
    assert split_sentences("one two, three four, five", "en", max_chars=20) == [
        "one two, three four,",
        "five",
    ]
    assert split_sentences("one two three", "en", max_chars=8) == ["one two", "three"]
    assert split_sentences("one two three", "en", max_chars=7) == ["one two", "three"]
    assert split_sentences("abcdefgh", "en", max_chars=3) == ["abc", "def", "gh"]
    assert split_sentences("一二三，四五六", "zh", max_chars=5) == ["一二三，", "四五六"]


def test_an_accent_stays_with_its_letter() -> None:
    assert split_sentences("abe\u0301cd", "en", max_chars=3) == ["ab", "e\u0301c", "d"]


def test_max_chars_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_chars"):
        split_sentences("a", "en", max_chars=0)


@given(
    st.text(alphabet=st.sampled_from("aA1é.,;:!?\"'()。， \n\u0301-—$"), max_size=200),
    st.integers(1, 30),
    st.sampled_from(["en", "fr", "de", "ja", "xx"]),
)
def test_nothing_is_lost_and_nothing_is_too_long(text: str, max_chars: int, language: str) -> None:
    found = split_sentences(text, language, max_chars=max_chars)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(piece == piece.strip() and 1 <= len(piece) <= max_chars for piece in found)


def test_a_million_characters_take_no_second() -> None:
    for text in ("The quick fox, it ran. " * 45_000, "a" * 1_000_000, "a, " * 333_333):
        began = time.process_time()
        found = split_sentences(text, "en", max_chars=400)
        assert time.process_time() - began < 1.5
        assert len(found) >= 2_500
