"""Deltas of a growing transcript: agreed upon twice, never taken back."""

from __future__ import annotations

import pytest

from engine.media.live_transcript import LiveTranscript, split_words


def said(*texts: str) -> tuple[LiveTranscript, list[str]]:
    live = LiveTranscript()
    return live, [live.hypothesis(split_words(text)) for text in texts]


def test_what_two_hypotheses_agree_on_is_said_once() -> None:
    live, deltas = said(
        "And so my",
        "And so, my fellow",
        "And so, my fellow America",
        "And so, my fellow Americans, ask",
        "And so, my fellow Americans, ask not.",
    )
    assert deltas == ["", "And", " so, my fellow", "", " Americans, ask"]
    whole = "And so, my fellow Americans, ask not what your country can do for you."
    assert "".join(deltas) + live.final(whole) == whole


def test_agreement_is_with_the_last_hypothesis_only() -> None:
    _, deltas = said("one two", "one too", "one two", "one two")
    assert deltas == ["", "one", "", " two"]


def test_a_hypothesis_that_contradicts_what_was_said_adds_nothing() -> None:
    live, deltas = said("a b", "a b c", "x b c d", "a b c d", "a b c d")
    assert deltas == ["", "a b", "", "", " c d"]
    assert live.text == "a b c d"


def test_a_shorter_hypothesis_adds_nothing() -> None:
    _, deltas = said("a b c", "a b c", "a", "a b c d")
    assert deltas == ["", "a b c", "", ""]


def test_a_comma_in_what_was_said_is_not_a_contradiction() -> None:
    _, deltas = said("well then", "well then", "Well, then we go", "Well, then we go")
    assert deltas == ["", "well then", "", " we go"]


@pytest.mark.parametrize("final", ["Well, then we go.", "we go", "well", ""])
def test_a_final_text_that_differs_gets_no_delta(final: str) -> None:
    live, _ = said("well then", "well then")
    assert live.final(final) == ""


def test_a_final_text_alone_is_said_whole() -> None:
    assert LiveTranscript().final(" Hello there. ") == "Hello there."
    live, _ = said("Hello there.", "Hello there.")
    assert live.final("Hello there.") == ""


def test_words_may_come_with_their_spaces_or_without() -> None:
    for words in ([" Hello", " there", "-ish", " all"], ["Hello", "there-ish", "all"]):
        live = LiveTranscript()
        assert live.hypothesis(words) == ""
        assert live.hypothesis(words) == "Hello there-ish all"
    live = LiveTranscript()
    live.hypothesis(["こん", "にちは"])
    assert live.hypothesis(["こん", "にちは"]) == "こんにちは"
    assert live.hypothesis([]) == live.hypothesis([" "]) == ""


def test_scripts_without_spaces_are_said_by_character() -> None:
    assert split_words("東京は big 都市") == ["東", "京", "は", " big", " 都", "市"]
    live, deltas = said("東京です", "東京でした", "東京でした。")
    assert deltas == ["", "東京で", "した"]
    assert live.final("東京でした。") == "。"
