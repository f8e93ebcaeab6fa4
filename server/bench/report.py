"""The report of a measurement: a JSON document and a table in Markdown."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from engine.units import format_size
from server.bench.figures import Comparison, Spread
from server.bench.runner import CaseResult, Result


def document(result: Result, machine: dict[str, Any], command: str) -> dict[str, Any]:
    """The whole measurement, with the figures of each round."""
    return {
        "scenario": result.scenario.name,
        "command": command,
        "machine": machine,
        "sides": [
            {
                "name": target.name,
                "command": shlex.join(target.command),
                "environment": dict(target.environment),
            }
            for target in result.targets
        ],
        "figures": [
            {
                "name": each.name,
                "unit": each.unit,
                "higher_is_better": each.higher_is_better,
            }
            for each in result.scenario.figures
        ],
        "cases": [_case(result, each) for each in result.cases],
        "warnings": result.warnings(),
    }


def _case(result: Result, case: CaseResult) -> dict[str, Any]:
    ratios = {}
    for figure in result.scenario.figures:
        comparison = case.comparison(figure)
        if comparison is not None:
            ratios[figure.name] = {**_spread(comparison.ratio), "noisy": comparison.noisy}
    return {
        "name": case.case.name,
        "streams": case.case.streams,
        "sides": [
            {
                "turns": [_finite(each) for each in case.figures[index]],
                "summary": {
                    figure.name: _spread(spread)
                    for figure in result.scenario.figures
                    if (spread := case.spread(index, figure)) is not None
                },
                "errors": dict(case.errors[index]),
            }
            for index in range(len(result.targets))
        ],
        "ratios": ratios,
        "other_programs_cores": case.others,
    }


def _spread(spread: Spread) -> dict[str, float | None]:
    return _finite({"median": spread.median, "q1": spread.q1, "q3": spread.q3})


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Infinity and NaN become null, as JSON has neither."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """The head and the rows: medians, and the first and third quartile in parentheses."""
    names = [target.name for target in result.targets]
    head = ["", "figure", *names]
    if len(names) == 2:
        head.append(f"{names[0]} ÷ {names[1]}")
    rows = []
    for case in result.cases:
        for figure in result.scenario.figures:
            row = [case.case.name, f"{figure.name}, {figure.unit}" if figure.unit else figure.name]
            for index in range(len(names)):
                spread = case.spread(index, figure)
                row.append(_cell(spread))
            if len(names) == 2:
                row.append(_ratio(case.comparison(figure)))
            rows.append(row)
    return head, rows


def markdown(result: Result, machine: dict[str, Any], command: str, repeats: int) -> str:
    """The table, and all that is needed to reproduce it."""
    head, rows = table(result)
    lines = [
        f"# roundhouse bench {result.scenario.name}",
        "",
        f"{machine['date']}, commit {machine['commit'] or 'unknown'}. {machine_line(machine)}",
        "",
        f"    {command}",
        "",
        f"Medians of {repeats} repeats, first and third quartile in parentheses.",
    ]
    if len(result.targets) == 2:
        lines[-1] += (
            " The order is A B B A. A ratio is the median of the ratios within each pair. ≈ marks a"
            " ratio whose quartiles are further apart than it is from 1."
        )
    lines += ["", _row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
    for target in result.targets:
        if target.command:
            settings = " ".join(f"{key}={value}" for key, value in target.environment.items())
            lines += [f"{target.name}:", "", f"    {settings} {shlex.join(target.command)}", ""]
    if warnings := result.warnings():
        lines += ["Warnings:", "", *(f"* {each}" for each in warnings), ""]
    return "\n".join(lines)


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = machine["omp_num_threads"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {format_size(machine['memory_bytes'])}, "
        f"{'; '.join(machine['gpus']) or 'no GPU'}; {machine['system']}, Python "
        f"{machine['python']}, {versions}; OMP_NUM_THREADS "
        f"{'not set' if threads is None else threads}."
    )


def write(
    folder: Path, result: Result, machine: dict[str, Any], command: str, repeats: int
) -> list[Path]:
    """Write both into a folder, which is created if it is missing. Returns their paths.

    Raises:
        OSError: it cannot be written.

    """
    folder.mkdir(parents=True, exist_ok=True)
    json_path = folder / f"{result.scenario.name}.json"
    markdown_path = folder / f"{result.scenario.name}.md"
    text = json.dumps(document(result, machine, command), indent=1, allow_nan=False)
    json_path.write_text(text, encoding="utf-8")
    markdown_path.write_text(markdown(result, machine, command, repeats), encoding="utf-8")
    return [json_path, markdown_path]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(spread: Spread | None) -> str:
    if spread is None or math.isnan(spread.median):
        return "–"
    return f"{_number(spread.median)} ({_number(spread.q1)}–{_number(spread.q3)})"


def _ratio(comparison: Comparison | None) -> str:
    if comparison is None or math.isnan(comparison.ratio.median):
        return "–"
    if comparison.figure.higher_is_better is None:
        return ""
    ratio = comparison.ratio
    mark = " ≈" if comparison.noisy else ""
    return f"{ratio.median:.2f} ({ratio.q1:.2f}–{ratio.q3:.2f}){mark}"


def _number(value: float) -> str:
    """Three digits without an exponent: 1251, 83.4, 0.52."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
