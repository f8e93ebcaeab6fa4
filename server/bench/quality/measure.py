"""One number about the quality of a model, with what it was counted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.figures import Spread, quantile


@dataclass(frozen=True, slots=True)
class Measure:
    """A number, how many items it is of, how it spreads, and the bad items."""

    name: str
    value: float
    counted: str
    """Of how many items, such as `10 questions`."""
    unit: str = ""
    higher_is_better: bool | None = True
    """None: neither. Such a number explains the others."""
    part: str = ""
    """What the model was compared with, or which voice of it spoke."""
    low: float | None = None
    high: float | None = None
    spread: str = ""
    """What `low` and `high` are."""
    items: tuple[str, ...] = ()
    """The items that were not as they should be, or the worst one, each in one line."""


def share(
    name: str, right: int, of: int, kind: str, failed: Sequence[str] = (), *, part: str = ""
) -> Measure:
    """How many of some items are as they should be, in percent.

    Raises:
        ValueError: there are no items.

    """
    if not of:
        raise ValueError(f"{name}: there are no {kind}")
    return Measure(
        name, 100 * right / of, f"{right} of {of} {kind}", "%", part=part, items=tuple(failed)
    )


def median(
    name: str,
    values: Sequence[float],
    kind: str,
    unit: str = "",
    *,
    higher_is_better: bool,
    part: str = "",
) -> Measure:
    """The median of at least one value, with the quartiles."""
    spread = Spread.of(values)
    return Measure(
        name, spread.median, f"{len(values)} {kind}", unit, higher_is_better, part,
        low=spread.q1, high=spread.q3, spread="quartiles",
    )  # fmt: skip


def mean(
    name: str,
    values: Sequence[float],
    kind: str,
    unit: str = "",
    *,
    higher_is_better: bool | None,
    part: str = "",
) -> Measure:
    """The mean of at least one value, with its standard error where there are more."""
    count = len(values)
    middle = sum(values) / count
    low = high = None
    if count > 1:
        error = (sum((each - middle) ** 2 for each in values) / (count - 1) / count) ** 0.5
        low, high = middle - error, middle + error
    return Measure(
        name, middle, f"{count} {kind}", unit, higher_is_better, part,
        low, high, "" if low is None else "standard error",
    )  # fmt: skip


def largest(
    name: str, values: Sequence[float], labels: Sequence[str], kind: str, *, part: str = ""
) -> Measure:
    """The largest of some differences, with the median, and the item that has it."""
    value = max(values)
    worst = labels[list(values).index(value)]
    return Measure(
        name, value, kind, "", False, part, low=quantile(values, 0.5), high=value,
        spread="median to largest", items=(f"largest: {worst}",) if value else (),
    )  # fmt: skip
