"""Figures of a measurement: meaning, spread, and comparison of two targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a scenario measures."""

    name: str
    unit: str
    higher_is_better: bool | None = False
    """None: neither. Such a figure explains the others."""


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` are below, interpolated linearly.

    This is Hyndman and Fan's type 7, as in numpy and vLLM. No values give NaN.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    # Equal values need no interpolation, and the difference of two infinities is NaN.
    return low if low == high else low + (high - low) * (place - math.floor(place))


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, and their first and third quartile."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(*(quantile(values, share) for share in (0.5, 0.25, 0.75)))

    @property
    def iqr(self) -> float:
        """Interquartile range, in the unit of the values."""
        return self.q3 - self.q1


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of both targets, measured in pairs of neighbouring rounds."""

    figure: Figure
    ours: Spread
    peer: Spread
    ratio: Spread
    """Of ours ÷ peer within each pair: a slowdown of the whole pair cancels out."""

    @classmethod
    def of(cls, figure: Figure, ours: Sequence[float], peer: Sequence[float]) -> Comparison:
        """Compare two series of equal length. The i-th values are one pair.

        Raises:
            ValueError: the series differ in length.

        """
        ratios = [
            a / b if b else math.copysign(math.inf, a) if a else 1.0
            for a, b in zip(ours, peer, strict=True)
        ]
        return cls(figure, Spread.of(ours), Spread.of(peer), Spread.of(ratios))

    @property
    def noisy(self) -> bool:
        """Whether the ratio's spread exceeds its distance from 1, so that it shows no effect."""
        return not self.ratio.iqr <= abs(self.ratio.median - 1)


def round_order(repeats: int) -> list[tuple[int, int]]:
    """The order of the rounds of two targets: A B, B A, A B and so on.

    A drift of the machine (heat, other programs) then affects both equally.
    """
    return [(0, 1) if pair % 2 == 0 else (1, 0) for pair in range(repeats)]
