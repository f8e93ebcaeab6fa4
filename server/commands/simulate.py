"""The table and the plots of `roundhouse simulate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.simulation.comparison import OURS, Comparison
from engine.simulation.outcome import Move, Outcome
from engine.units import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tables(comparison: Comparison) -> RenderableType:
    """A table of the policies, then the waits of ours by model and priority."""
    trace = comparison.trace
    total_bytes = sum(model.nbytes for model in trace.models.values())
    best = comparison.clairvoyant
    title = (
        f"{trace.name}: {len(trace.measured)} requests in "
        f"{trace.requests[-1].at_s - trace.measured[0].at_s:.0f} s, {len(trace.models)} models of "
        f"{format_size(total_bytes)} on {format_size(trace.budget_bytes)}"
        + (f", {format_size(trace.host_bytes)} of host memory" if trace.host_bytes else "")
    )
    ratio = best.makespan_s or math.nan
    table = Table(
        "", *comparison.outcomes, f"clairvoyant\n({'exact' if best.exact else 'at least'})"
    )
    rows: tuple[tuple[str, Callable[[Outcome], str], str], ...] = (
        ("makespan", lambda each: f"{each.makespan_s:.1f} s", f"{best.makespan_s:.1f} s"),
        ("… of clairvoyant", lambda each: f"{each.makespan_s / ratio:.2f}", "1.00"),
        ("swaps", lambda each: str(each.swaps), ""),
        ("bytes moved", lambda each: format_size(each.bytes_moved), ""),
        ("wait p50", lambda each: f"{each.waits().p50_s:.1f} s", ""),
        ("wait p95", lambda each: f"{each.waits().p95_s:.1f} s", ""),
        ("wait max", lambda each: f"{each.waits().max_s:.1f} s", ""),
        ("overtaken at worst", lambda each: f"{each.worst_overtake_s:.1f} s", ""),
        ("refused", lambda each: str(each.refused), ""),
    )
    for name, cell, of_clairvoyant in rows:
        table.add_row(name, *map(cell, comparison.outcomes.values()), of_clairvoyant)
    by_kind = Table(f"{OURS}: model", "priority", "requests", "wait p50", "p95", "max")
    for (model, priority), waits in comparison.outcomes[OURS].waits_by_kind().items():
        by_kind.add_row(
            escape(model),
            priority.name.lower(),
            str(waits.count),
            f"{waits.p50_s:.1f} s",
            f"{waits.p95_s:.1f} s",
            f"{waits.max_s:.1f} s",
        )
    head = comparison.outcomes[OURS].head_wait()
    last = (
        f"The longest wait as the oldest of all: {head.wait_s:.1f} s ({head.model}), "
        f"{head.transitions_s:.1f} s of it while a model moved."
    )
    last += (
        f"\nmax_overtake_s is {comparison.max_overtake_s:.1f} s; the longest request needs "
        f"{comparison.service_s:.1f} s by itself."
    )
    return Group(Text(title), table, by_kind, Text(last))


def plot(comparison: Comparison, path: Path) -> None:
    """Draw when each model was on the device, by policy, and how long requests waited.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: the file's name does not end in a format that matplotlib writes.

    """
    from matplotlib.figure import Figure

    names = list(comparison.trace.models)
    figure = Figure(figsize=(12, 2.2 * len(comparison.outcomes) + 3), layout="constrained")
    axes = figure.subplots(len(comparison.outcomes) + 1, 1)
    for axis, (policy, outcome) in zip(axes, comparison.outcomes.items(), strict=False):
        for row, name in enumerate(names):
            axis.broken_barh(_resident(outcome, name), (row - 0.4, 0.8), color=f"C{row % 10}")
            moving = [
                (each.began_s, each.ended_s - each.began_s)
                for each in outcome.transitions
                if each.model == name and each.brings_in
            ]
            axis.broken_barh(moving, (row - 0.4, 0.8), color="0.8")
        axis.set_xlim(outcome.visits[0].request.at_s, _end_s(outcome))
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_title(f"{policy}: on the device (grey: coming in)", fontsize=9)
        axis.set_xlabel("s", fontsize=8)
    _draw_waits(axes[-1], comparison)
    figure.savefig(path, dpi=120)


def plot_waits(comparison: Comparison, path: Path) -> None:
    """Draw only how long requests waited, by policy.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: the file's name does not end in a format that matplotlib writes.

    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    _draw_waits(figure.subplots(), comparison)
    figure.savefig(path, dpi=120)


def _draw_waits(axis: Axes, comparison: Comparison) -> None:
    for policy, outcome in comparison.outcomes.items():
        waits_s = sorted(visit.wait_s for visit in outcome.visits)
        shares = [100 * (rank + 1) / len(waits_s) for rank in range(len(waits_s))]
        axis.step(waits_s, shares, where="post", label=policy)
    axis.axvline(comparison.max_overtake_s, color="0.5", linestyle=":", label="max_overtake_s")
    axis.set_xscale("symlog")
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds", fontsize=8)
    axis.yaxis.set_major_formatter("{x:.0f} %")
    axis.set_title("requests that waited at most so long", fontsize=9)
    axis.legend(fontsize=8)


def _resident(outcome: Outcome, name: str) -> list[tuple[float, float]]:
    """`(since, seconds)` of each stay of a model on the device, as `broken_barh` takes it."""
    stays: list[tuple[float, float]] = []
    since_s: float | None = None
    for each in outcome.transitions:
        if each.model != name:
            continue
        if each.brings_in:
            since_s = each.ended_s
        elif each.move in (Move.PARK, Move.UNLOAD) and since_s is not None:
            stays.append((since_s, each.began_s - since_s))
            since_s = None
    if since_s is not None:
        stays.append((since_s, max(0.0, _end_s(outcome) - since_s)))
    return stays


def _end_s(outcome: Outcome) -> float:
    return outcome.visits[0].request.at_s + outcome.makespan_s
