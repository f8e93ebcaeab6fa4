"""The figures of a measurement as a bar chart."""

from __future__ import annotations

from pathlib import Path

from server.bench.runner import Result

COLUMNS = 3
WIDTH = 0.4
DIRECTIONS = {True: " (higher is better)", False: " (lower is better)", None: ""}


def draw(result: Result, path: Path) -> None:
    """Draw one panel per figure and one bar per target; whiskers are the quartiles.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.

    """
    from matplotlib.figure import Figure

    figures = result.scenario.figures
    rows = -(-len(figures) // COLUMNS)
    picture = Figure(figsize=(4 * COLUMNS, 2.8 * rows), layout="constrained")
    grid = picture.subplots(rows, COLUMNS, squeeze=False)
    for axis, figure in zip(grid.flat, figures, strict=False):
        for index, target in enumerate(result.targets):
            places, medians, below, above = [], [], [], []
            for place, case in enumerate(result.cases):
                if (spread := case.spread(index, figure)) is not None:
                    places.append(place + index * WIDTH)
                    medians.append(spread.median)
                    below.append(spread.median - spread.q1)
                    above.append(spread.q3 - spread.median)
            axis.bar(places, medians, WIDTH, yerr=(below, above), label=target.name, capsize=3)
        axis.set_title(figure.name + DIRECTIONS[figure.higher_is_better], fontsize=9)
        axis.set_ylabel(figure.unit, fontsize=8)
        middle = WIDTH * (len(result.targets) - 1) / 2
        axis.set_xticks(
            [place + middle for place in range(len(result.cases))],
            [case.case.name for case in result.cases],
            fontsize=8,
        )
        axis.legend(fontsize=7)
    for axis in list(grid.flat)[len(figures) :]:
        axis.remove()
    picture.savefig(path, dpi=120)
