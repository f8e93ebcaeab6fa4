"""Whether vectors order sentences as a person does, and how a batch or a dtype changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.bench.quality.client import Client, Vectors
from server.bench.quality.measure import Measure, largest
from server.bench.quality.ranks import rank_correlation
from server.bench.quality.sentences import PAIRS

TEXTS = tuple(sorted({text for _, first, second in PAIRS for text in (first, second)}))
"""The sentences of the judged pairs, each once."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vectors of `TEXTS`, of a model or of a reference."""

    name: str
    vectors: Vectors


def listen(client: Client, model: str) -> Embedding:
    """The vectors of a model, all from one request."""
    return Embedding(model, client.embed(model, TEXTS))


def measure(client: Client, found: Embedding, references: Sequence[Embedding]) -> list[Measure]:
    """The measures of the model with these vectors, against itself one by one and others."""
    alone = np.concatenate([client.embed(found.name, [text]) for text in TEXTS])
    return [
        judged_pairs(found.vectors),
        difference("largest difference from one text at a time", found.vectors, alone),
        *(
            difference("largest difference", found.vectors, other.vectors,
                part=f"against {other.name}")
            for other in references
            if found.vectors.shape == other.vectors.shape
        ),
    ]  # fmt: skip


def judged_pairs(vectors: Vectors) -> Measure:
    """The rank correlation of cosines with what a person finds; spread: each pair left out once."""
    place = {text: row for row, text in enumerate(TEXTS)}
    degrees = [degree for degree, _, _ in PAIRS]
    cosines = [float(vectors[place[first]] @ vectors[place[second]]) for _, first, second in PAIRS]
    without = [
        rank_correlation(
            degrees[:number] + degrees[number + 1 :], cosines[:number] + cosines[number + 1 :]
        )
        for number in range(len(PAIRS))
    ]
    return Measure(
        "rank correlation with judged pairs", rank_correlation(degrees, cosines),
        f"{len(PAIRS)} pairs", low=min(without), high=max(without), spread="with any pair left out",
    )  # fmt: skip


def difference(name: str, vectors: Vectors, others: Vectors, *, part: str = "") -> Measure:
    """The largest difference between two numbers at the same place, of vectors of length 1."""
    values = [float(each) for each in np.abs(vectors - others).max(axis=1)]
    count = f"{len(TEXTS)} texts × {vectors.shape[1]} numbers"
    return largest(name, values, TEXTS, count, part=part)
