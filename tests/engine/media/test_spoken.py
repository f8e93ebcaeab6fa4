"""Words and the turns of speakers, put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.events import Segment, SpeakerTurn, Word
from engine.media.spoken import SpokenSegment, spoken_segments


def segment(start_s: float, end_s: float, text: str, *words: Word) -> Segment:
    return Segment(
        id=0,
        start_s=start_s,
        end_s=end_s,
        text=text,
        seek=0,
        tokens=(),
        temperature=0.0,
        avg_logprob=0.0,
        compression_ratio=1.0,
        no_speech_prob=0.0,
        words=words,
    )


def said(text: str, start_s: float = 0.0, each_s: float = 1.0) -> Segment:
    """A segment whose words last as long as each other."""
    words = tuple(
        Word(f" {word}", start_s + each_s * index, start_s + each_s * (index + 1))
        for index, word in enumerate(text.split())
    )
    return segment(start_s, words[-1].end_s, f" {text}", *words)


def test_a_speaker_says_what_is_within_a_turn() -> None:
    turns = [SpeakerTurn(0, 2, "A"), SpeakerTurn(2, 3, "B"), SpeakerTurn(3, 5, "A")]
    assert spoken_segments([said("one two three"), said("four five", 3.0)], turns) == [
        SpokenSegment(0, 2, "one two", "A"),
        SpokenSegment(2, 3, "three", "B"),
        SpokenSegment(3, 5, "four five", "A"),
    ]


@pytest.mark.parametrize(
    ("turns", "speaker"),
    [
        ([(0.0, 10.4, "A"), (10.4, 20.0, "B")], "B"),  # most of the word
        ([(0.0, 10.4, "B"), (10.4, 10.7, "A"), (10.7, 11.0, "B")], "B"),  # of two turns together
        ([(0.0, 40.0, "B"), (1.0, 2.0, "A"), (3.0, 4.0, "A")], "B"),  # a turn around others
        ([(0.0, 9.0, "B"), (1.0, 2.0, "A"), (12.5, 14.0, "A")], "B"),  # in a gap: the closer one
        ([(0.0, 9.0, "A"), (12.0, 14.0, "B")], "B"),
        ([(0.0, 9.0, "B"), (1.0, 2.0, "A")], "B"),  # after all: the one that ended last
        ([(12.0, 14.0, "B"), (15.0, 16.0, "A")], "B"),  # before all
        ([], "A"),
    ],
)
def test_a_word_belongs_to_who_speaks_most_or_closest(
    turns: list[tuple[float, float, str]], speaker: str
) -> None:
    (found,) = spoken_segments([said("word", 10.0)], [SpeakerTurn(*turn) for turn in turns])
    assert found == SpokenSegment(10.0, 11.0, "word", speaker)


def test_a_word_that_takes_no_time_is_said_within_the_turn_around_it() -> None:
    turns = [SpeakerTurn(0, 1, "A"), SpeakerTurn(1, 9, "B"), SpeakerTurn(9, 10, "A")]
    (found,) = spoken_segments([said("word", 5.0, 0.0)], turns)
    assert found.speaker == "B"


def test_a_long_pause_begins_a_new_segment_and_a_short_one_does_not() -> None:
    turns = [SpeakerTurn(0, 100, "A")]
    found = spoken_segments([said("one"), said("two", 3.0), said("three", 6.1)], turns)
    assert [each.text for each in found] == ["one two", "three"]


def test_segments_without_words_belong_to_one_speaker_each() -> None:
    """As those of models that do not say when a word was spoken."""
    turns = [SpeakerTurn(0, 4, "A"), SpeakerTurn(4, 9, "B")]
    found = spoken_segments(
        [segment(0, 5, " mine"), segment(5, 9, "yours."), segment(9, 9, " ")], turns
    )
    assert [(each.text, each.speaker) for each in found] == [("mine", "A"), ("yours.", "B")]


class Counted(list[SpeakerTurn]):
    """Counts the turns that were looked at."""

    looked_at = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.looked_at += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[SpeakerTurn]:
        self.looked_at += len(self)
        return super().__iter__()


def test_many_words_and_turns_take_no_square_of_time() -> None:
    turns = Counted(SpeakerTurn(each, each + 1, "AB"[each % 2]) for each in range(2000))
    found = spoken_segments([said("word " * 2000)], turns)
    assert len(found) == 2000 and {each.speaker for each in found[::2]} == {"A"}
    assert turns.looked_at < 5 * 2000
