"""From scores of overlapping windows to turns of speakers, as sherpa-onnx and pyannote do it.

These are the steps of OfflineSpeakerDiarization in sherpa-onnx, after pyannote's pipeline
(Bredin, pyannote.audio 2.1 speaker diarization pipeline, Interspeech 2023). The library has them
in one call, which keeps the interpreter's lock from its first window to its last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import LoadFailed
from engine.runtimes.sherpa_diarization.files import RATE

LEAST_FRAMES = 10
"""A speaker with fewer frames of a window alone is not compared with others."""

SHORTEST_S, PAUSE_S = 0.3, 0.5
"""Shorter turns are left out, and a shorter pause ends none: the library's defaults."""

STEPS_PER_WINDOW = 10
"""Windows overlap: each begins a tenth of its length after the one before."""

Labels: TypeAlias = NDArray[np.int8]
"""1 where somebody speaks: (frames, speakers)."""

Span: TypeAlias = tuple[int, int]
"""First sample, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a segmentation model. Lengths are in samples."""

    window: int
    field: int
    """What a frame sees."""
    step: int
    """Between two frames."""
    powerset: Labels
    """Who speaks in each class: (classes, speakers)."""

    @classmethod
    def of(cls, numbers: Mapping[str, int], name: str) -> Shape:
        """The shape that a file's metadata says.

        Raises:
            LoadFailed: they do not fit each other.

        """
        speakers, most = numbers["num_speakers"], numbers["powerset_max_classes"]
        groups: list[tuple[int, ...]] = [()]
        for together in range(1, most + 1):
            groups += combinations(range(speakers), together)
            if len(groups) > numbers["num_classes"]:
                break
        fits = 1 <= most <= 2 and len(groups) == numbers["num_classes"]
        window = numbers["window_size"]
        field, step = numbers["receptive_field_size"], numbers["receptive_field_shift"]
        if not fits or min(field, step) < 1 or window < STEPS_PER_WINDOW:
            raise LoadFailed(f"{name}: the numbers of its metadata do not fit each other")
        if numbers["sample_rate"] != RATE:
            raise LoadFailed(f"{name}: it must take samples at {RATE} Hz")
        powerset = np.zeros((len(groups), speakers), np.int8)
        for index, group in enumerate(groups):
            powerset[index, list(group)] = 1
        return cls(window, field, step, powerset)

    @property
    def hop(self) -> int:
        """Between the beginnings of two windows."""
        return self.window // STEPS_PER_WINDOW

    def starts(self, count: int) -> range:
        """First samples of the windows over `count` samples. The last may reach beyond them."""
        beyond = max(0, count - self.window)
        return range(0, beyond + self.hop if beyond % self.hop else beyond + 1, self.hop)

    def labels(self, scores: NDArray[np.float32]) -> Labels:
        """Who speaks in each frame, by its likeliest class. `scores` is (frames, classes)."""
        found: Labels = self.powerset[scores.argmax(axis=1)]
        return found

    def frame(self, window: int) -> int:
        """The first frame of a window, counted from the beginning of the recording."""
        return int(window * self.hop / self.step + 0.5)

    def frames(self, windows: int) -> int:
        """Frames of a recording."""
        return (self.window + (windows - 1) * self.hop) // self.step + 1


@dataclass(frozen=True, slots=True)
class LocalSpeaker:
    """A speaker of one window, before the windows are compared."""

    window: int
    speaker: int
    spans: tuple[Span, ...]
    """Where nobody else speaks."""


def local_speakers(shape: Shape, labels: Sequence[Labels]) -> list[LocalSpeaker]:
    """All speakers of all windows with enough frames of their own."""
    found = []
    for window, each in enumerate(labels):
        alone = np.where(each.sum(axis=1, keepdims=True) < 2, each, 0)
        for speaker in range(each.shape[1]):
            if alone[:, speaker].sum() >= LEAST_FRAMES:
                begin, scale = window * shape.hop, shape.window / len(each)
                spans = tuple(
                    (int(first * scale) + begin, int(min(end, len(each) - 1) * scale) + begin)
                    for first, end in _runs(alone[:, speaker])
                )
                found.append(LocalSpeaker(window, speaker, spans))
    return found


def joined(
    shape: Shape,
    labels: Sequence[Labels],
    members: Sequence[LocalSpeaker],
    clusters: Sequence[int],
    samples: int,
) -> Labels:
    """Who speaks in each frame of the recording: (frames, clusters).

    `clusters` has the number of each of `members`. As many speak at once as in the mean of the
    windows, and those first that most windows hear.
    """
    count = max(clusters) + 1
    votes = np.zeros((shape.frames(len(labels)), count), np.int32)
    speaking = np.zeros(len(votes), np.float32)
    windows = np.zeros(len(votes), np.float32)
    cluster_of: dict[int, list[tuple[int, int]]] = {}
    for member, cluster in zip(members, clusters, strict=True):
        cluster_of.setdefault(member.window, []).append((member.speaker, cluster))
    for window, each in enumerate(labels):
        place = slice(shape.frame(window), shape.frame(window) + len(each))
        speaking[place] += each.sum(axis=1)
        windows[place] += 1
        own = np.zeros((len(each), count), np.int32)
        for speaker, cluster in cluster_of.get(window, ()):
            own[:, cluster] |= each[:, speaker]
        votes[place] += own
    most = (speaking / (windows + 1e-12) + 0.5).astype(np.int32)
    rank = np.argsort(np.argsort(-votes, axis=1, kind="stable"), axis=1)
    heard = ((rank < most[:, None]) & (votes > 0)).astype(np.int8)
    ends_within = (samples - shape.window) % shape.hop > 0
    return heard[: samples // shape.step + 1] if ends_within else heard


def spans_of(shape: Shape, heard: Labels) -> list[list[tuple[float, float]]]:
    """The turns of each speaker, in seconds. `heard` is (frames, speakers)."""
    scale, offset = shape.step / RATE, shape.field / RATE / 2
    found = []
    for speaker in range(heard.shape[1]):
        turns: list[tuple[float, float]] = []
        for first, end in _runs(heard[:, speaker]):
            start_s = first * scale + offset
            end_s = min(end, len(heard) - 1) * scale + offset
            if turns and start_s - turns[-1][1] <= PAUSE_S:
                turns[-1] = (turns[-1][0], end_s)
            else:
                turns.append((start_s, end_s))
        found.append([turn for turn in turns if turn[1] - turn[0] > SHORTEST_S])
    return found


def _runs(active: NDArray[np.int8]) -> list[tuple[int, int]]:
    """First frame of each run of ones, and the frame after its last."""
    edges = np.flatnonzero(np.diff(active, prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
