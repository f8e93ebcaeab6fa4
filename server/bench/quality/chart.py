"""The measures of several models as bar charts: a file for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.bench.plot import DIRECTIONS
from server.bench.quality.measure import Measure
from server.bench.quality.report import value
from server.bench.quality.subject import Subject

COLUMNS = 2
BAR_INCHES = 0.42


def draw(subjects: Sequence[Subject], folder: Path) -> list[Path]:
    """Draw a panel for each measure and a bar for each model, voice or comparison.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.

    """
    paths = []
    for task in dict.fromkeys(subject.task for subject in subjects if subject.measures):
        path = folder / f"quality-{task}.png"
        _draw([subject for subject in subjects if subject.task == task], path)
        paths.append(path)
    return paths


def bars(subjects: Sequence[Subject]) -> dict[str, list[tuple[str, Measure]]]:
    """The bars of each panel with their labels, in the order of the measures."""
    panels: dict[str, list[tuple[str, Measure]]] = {}
    for subject in subjects:
        name = f"{subject.model} ({subject.numbers})" if subject.numbers else subject.model
        for measure in subject.measures:
            label = f"{name}\n{measure.part}" if measure.part else name
            panels.setdefault(measure.name, []).append((label, measure))
    return panels


def _draw(subjects: Sequence[Subject], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = bars(subjects)
    rows = -(-len(panels) // COLUMNS)
    most = max(map(len, panels.values()))
    picture = Figure(figsize=(6.5 * COLUMNS, (1 + BAR_INCHES * most) * rows), layout="constrained")
    grid = list(picture.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, (name, found) in zip(grid, panels.items(), strict=False):
        for place, (_, measure) in enumerate(found):
            axis.barh(place, measure.value, color=f"C{place % 10}")
            if measure.low is not None and measure.high is not None:
                axis.plot([measure.low, measure.high], [place, place], color="black", marker="|")
            negative = measure.value < 0
            ends = [each for each in (measure.value, measure.low, measure.high) if each is not None]
            axis.annotate(
                f" {value(measure)} ", (min(ends) if negative else max(ends), place), fontsize=7,
                va="center", ha="right" if negative else "left", annotation_clip=False,
            )  # fmt: skip
        axis.set_yticks(range(len(found)), [label for label, _ in found], fontsize=7)
        axis.set_ylim(len(found) - 0.4, -0.6)
        axis.margins(x=0.18)
        kinds = {measure.spread for _, measure in found if measure.spread}
        lines = f"; lines: {', '.join(sorted(kinds))}" if kinds else ""
        axis.set_title(name + DIRECTIONS[found[0][1].higher_is_better] + lines, fontsize=9)
        axis.set_xlabel(found[0][1].unit, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    for axis in grid[len(panels) :]:
        axis.remove()
    picture.savefig(path, dpi=120)
