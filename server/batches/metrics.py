"""The metrics of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """How many batches there are that have not ended, and how many lines run."""

    waiting: int = 0
    """Being validated, or without a line that runs."""
    running: int = 0
    lines_running: int = 0
    lines_waiting: int = 0


class BatchMetrics:
    """Counts lines, and shows what waits and runs."""

    def __init__(self, counts: Callable[[], BatchCounts]) -> None:
        self.registry = CollectorRegistry()
        batches = Gauge(
            "roundhouse_batches",
            "Batches that have not ended, by whether a line of theirs runs.",
            ("state",),
            registry=self.registry,
        )
        lines = Gauge(
            "roundhouse_batch_lines",
            "Lines of batches that have not ended.",
            ("state",),
            registry=self.registry,
        )
        batches.labels("waiting").set_function(lambda: counts().waiting)
        batches.labels("running").set_function(lambda: counts().running)
        lines.labels("waiting").set_function(lambda: counts().lines_waiting)
        lines.labels("running").set_function(lambda: counts().lines_running)
        self._done = Counter(
            "roundhouse_batch_lines_done",
            "Lines of batches that have ended, by whether they succeeded.",
            ("result",),
            registry=self.registry,
        )
        for result in ("completed", "failed"):
            self._done.labels(result)

    def count(self, *, completed: int, failed: int) -> None:
        """Count lines that have ended."""
        self._done.labels("completed").inc(completed)
        self._done.labels("failed").inc(failed)
