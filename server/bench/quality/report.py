"""The measures of several models as a table, a page in Markdown and a JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.units import format_size
from server.bench.quality.measure import Measure
from server.bench.quality.subject import Subject

HEAD = ("model", "numbers", "measure", "of", "value", "spread", "counted")


def rows(subjects: Sequence[Subject]) -> list[tuple[str, ...]]:
    """A row for each measure of each model, as `HEAD` names its cells."""
    return [
        (subject.model, subject.numbers, each.name, each.part, value(each), spread(each),
            each.counted)
        for subject in subjects
        for each in subject.measures
    ]  # fmt: skip


def value(measure: Measure) -> str:
    """The value with its unit."""
    return f"{_number(measure.value)} {measure.unit}".strip()


def spread(measure: Measure) -> str:
    """The range of a measure and what it is, or nothing."""
    if measure.low is None or measure.high is None:
        return ""
    return f"{_number(measure.low)} to {_number(measure.high)} ({measure.spread})"


def _number(number: float) -> str:
    return f"{number:.3g}"


def markdown(subjects: Sequence[Subject], machine: dict[str, Any], command: str) -> str:
    """The page: the table, what was not measured, the items that failed, the machine."""
    lines = ["# Quality", "", f"`{command}`", "", _row(HEAD), _row(["---"] * len(HEAD))]
    lines += map(_row, rows(subjects))
    notes = [
        f"* {subject.model}: not measured: {note}" for subject in subjects for note in subject.notes
    ]
    lines += ["", *notes, "", "## Items", ""] if notes else ["", "## Items", ""]
    for subject in subjects:
        for measure in subject.measures:
            if measure.items:
                title = f"{subject.model}: {measure.name} {measure.part}".strip()
                lines += [f"* {title}", *(f"  * {item}" for item in measure.items)]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines += [
        "", "## Machine", "",
        f"* {machine['date']}, commit {machine['commit'] or 'unknown'}",
        f"* {machine['cpu']}, {machine['cores']} cores"
        f" (load {machine['load_average']:.1f}), {format_size(machine['memory_bytes'])};"
        f" {', '.join(machine['gpus']) or 'no GPU'}",
        f"* {versions}",
        *(f"* {subject.model}: {subject.source}, {subject.numbers}" for subject in subjects),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def document(subjects: Sequence[Subject], machine: dict[str, Any], command: str) -> dict[str, Any]:
    """The same for programs."""
    return {
        "command": command,
        "machine": machine,
        "models": [asdict(subject) for subject in subjects],
    }


def write(folder: Path, subjects: Sequence[Subject], machine: dict[str, Any], command: str
) -> list[Path]:  # fmt: skip
    """Write the page and the document into a folder, which is made.

    Raises:
        OSError: a file cannot be written.

    """
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "quality.md", folder / "quality.json"
    page.write_text(markdown(subjects, machine, command), encoding="utf-8")
    found = document(subjects, machine, command)
    data.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [page, data]
