"""Which words are whose: a transcript joined with the turns of its speakers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.events import Segment, SpeakerTurn, Word

LONGEST_PAUSE_S = 2.0
"""A speaker who goes on after a longer one begins a new segment."""

NOBODY = "A"
"""The speaker of a recording in which no turn was found."""


@dataclass(frozen=True, slots=True)
class SpokenSegment:
    """What one speaker says until another one speaks. Times in seconds."""

    start_s: float
    end_s: float
    text: str
    speaker: str


def spoken_segments(
    segments: Sequence[Segment], turns: Sequence[SpeakerTurn]
) -> list[SpokenSegment]:
    """The transcript by speakers. `turns` are ordered by their start, and may overlap.

    A word belongs to the speaker who speaks for most of its time, and one that nobody speaks to
    the closest turn. A segment without times of its words is one word.
    """
    speakers = _Speakers(turns)
    found: list[SpokenSegment] = []
    for word in _words(segments):
        speaker = speakers.at(word.start_s, word.end_s)
        last = found[-1] if found else None
        if (
            last is not None
            and last.speaker == speaker
            and word.start_s - last.end_s <= LONGEST_PAUSE_S
        ):
            found[-1] = SpokenSegment(
                last.start_s, max(last.end_s, word.end_s), last.text + word.text, speaker
            )
        else:
            found.append(SpokenSegment(word.start_s, word.end_s, word.text, speaker))
    return [
        SpokenSegment(each.start_s, each.end_s, each.text.strip(), each.speaker)
        for each in found
        if each.text.strip()
    ]


def _words(segments: Sequence[Segment]) -> Iterator[Word]:
    for segment in segments:
        if segment.words:
            yield from segment.words
        else:
            yield Word(segment.text, segment.start_s, segment.end_s)


class _Speakers:
    """Turns, looked up by time."""

    def __init__(self, turns: Sequence[SpeakerTurn]) -> None:
        self._turns = turns
        self._starts = [turn.start_s for turn in turns]
        # An earlier turn may end later, so the latest end so far is what only grows.
        self._ends = list(accumulate((turn.end_s for turn in turns), max))

    def at(self, start_s: float, end_s: float) -> str:
        """Who speaks for most of a span, or is closest to it."""
        first = bisect_right(self._ends, start_s)
        after = bisect_left(self._starts, end_s)
        seconds: dict[str, float] = {}
        for turn in self._turns[first:after]:
            shared_s = min(turn.end_s, end_s) - max(turn.start_s, start_s)
            if shared_s > 0:
                seconds[turn.speaker] = seconds.get(turn.speaker, 0.0) + shared_s
        if seconds:
            return max(seconds, key=seconds.__getitem__)
        near = list(self._turns[first : after + 1])
        if first:  # of the turns before, the one that ended last
            near.append(self._turns[bisect_left(self._ends, self._ends[first - 1])])
        middle_s = (start_s + end_s) / 2
        closest = min(
            near, key=lambda turn: max(turn.start_s - middle_s, middle_s - turn.end_s), default=None
        )
        return NOBODY if closest is None else closest.speaker
