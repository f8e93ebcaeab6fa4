"""What a step of the checks finds: a line of JSON for each figure and each test.

Each line is on disk before the next begins, so a crash or the end of the time loses none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "CHECK_GPU_RECORD"
"""The variable that names the file of a step."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number, and what it should be."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def wanted(self) -> str:
        """The bound in words; empty without one."""
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in (("≥", self.at_least), ("≤", self.at_most))
            if bound is not None
        ]
        return " and ".join(bounds)

    @property
    def good(self) -> bool:
        """Whether the value is within its bounds. NaN never is, if there is one."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended."""

    test: str
    outcome: str
    """`passed`, `failed` or `skipped`."""
    seconds: float
    why: str = ""


Line = Figure | Outcome


class Record:
    """The file of one step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_this_step(cls, environ: Mapping[str, str] = os.environ) -> Record | None:
        """The file that the environment names, if it names one."""
        return cls(Path(environ[RECORD])) if environ.get(RECORD) else None

    def add(self, line: Line) -> None:
        """Append a line, and have it on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Line]:
        """All lines. The last may be cut if the machine went down while it was written."""
        if not self.path.is_file():
            return []
        found: list[Line] = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                document = json.loads(text)
            except ValueError:
                continue
            found.append(Outcome(**document) if "test" in document else Figure(**document))
        return found


def tell(figure: Figure) -> None:
    """Print a figure, and record it if a step of the checks asks for it."""
    mark = "" if not figure.wanted else f"  (wanted {figure.wanted}{'' if figure.good else ': NO'})"
    note = f"  {figure.note}" if figure.note else ""
    print(f"{figure.name}: {figure.value:.4g} {figure.unit}{mark}{note}", flush=True)  # noqa: T201
    if (record := Record.of_this_step()) is not None:
        record.add(figure)
