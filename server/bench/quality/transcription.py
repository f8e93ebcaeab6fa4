"""How well a model hears read English with a known transcript, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.quality.client import Client, Heard
from server.bench.quality.measure import Measure, median, share
from server.bench.quality.recordings import Clip
from server.bench.quality.words import matched_words, normal_words, word_errors


@dataclass(frozen=True, slots=True)
class Transcription:
    """What a model heard in each clip."""

    name: str
    heard: tuple[Heard, ...]


def listen(client: Client, model: str, clips: Sequence[Clip]) -> Transcription:
    """Have a model hear the clips one after the other. The first of them is heard twice."""
    client.transcribe(model, clips[0].wav, words=True)  # loads and warms up what is to be timed
    return Transcription(
        model, tuple(client.transcribe(model, clip.wav, words=True) for clip in clips)
    )


def measure(
    found: Transcription, clips: Sequence[Clip], references: Sequence[Transcription]
) -> list[Measure]:
    """The measures of what a model heard, against the transcripts and against other models."""
    said = [clip.text for clip in clips]
    texts = [each.text for each in found.heard]
    measures = [word_error_share(said, texts)]
    if errors := start_errors(clips, found.heard):
        measures.append(
            median("error of word starts", errors, "words", "s", higher_is_better=False)
        )
    factors = [each.took_s / clip.seconds for each, clip in zip(found.heard, clips, strict=True)]
    measures.append(median("real-time factor", factors, "clips", higher_is_better=False))
    for other in references:
        others = [each.text for each in other.heard]
        wrong = [
            f"{text!r}, not {theirs!r}"
            for text, theirs in zip(texts, others, strict=True)
            if normal_words(text) != normal_words(theirs)
        ]
        measures.append(
            share("same transcript", len(texts) - len(wrong), len(texts), "clips", wrong,
                part=f"against {other.name}")
        )  # fmt: skip
    return measures


def word_error_share(said: Sequence[str], heard: Sequence[str], *, part: str = "") -> Measure:
    """The word error rate in percent, and each text that was not heard as it was said."""
    wrong = [
        f"{text!r}, heard {other!r}"
        for text, other in zip(said, heard, strict=True)
        if normal_words(text) != normal_words(other)
    ]
    errors, words = word_errors(said, heard)
    return Measure(
        "word error rate", 100 * errors / words,
        f"{errors} of {words} words in {len(said)} sentences", "%", False, part,
        items=tuple(wrong),
    )  # fmt: skip


def start_errors(clips: Sequence[Clip], heard: Sequence[Heard]) -> list[float]:
    """How many seconds each word that was heard rightly is from where it begins."""
    errors = []
    for clip, each in zip(clips, heard, strict=True):
        words = ["".join(normal_words(word)) for word, _ in each.words]
        for said, place in matched_words(clip.words, words):
            errors.append(abs(clip.starts_s[said] - each.words[place][1]))
    return errors
