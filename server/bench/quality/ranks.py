"""How well two orders of the same things agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, from -1 to 1; equal values share the mean of their ranks."""
    ranks = [
        [(each < value).sum() + ((each == value).sum() + 1) / 2 for value in each]
        for each in map(np.asarray, (first, second))
    ]
    return float(np.corrcoef(ranks)[0, 1])
