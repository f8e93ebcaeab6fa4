"""What the response cache did for requests, and how often."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.response_cache.store import NOTHING, Kept


class Outcome(StrEnum):
    """What the cache did for a request. The first three are values of the answer's header."""

    HIT = "hit"
    MISS = "miss"
    """Not found. The answer is kept if it completes."""
    REFRESH = "refresh"
    """Not looked for, as the client asked. The answer replaces the kept one."""
    OFF = "off"
    """The client wants nothing of the cache."""
    UNCACHEABLE = "uncacheable"
    """Another answer would be as good, so that none is kept."""


class CacheMetrics:
    """The metrics of the response cache."""

    def __init__(self, kept: Callable[[], Kept | None]) -> None:
        """`kept` says what the store holds. A store that does not know has no gauges."""
        self.registry = CollectorRegistry()
        self.counts = dict.fromkeys(Outcome, 0)
        self._requests = Counter(
            "roundhouse_response_cache_requests",
            "Requests by what the response cache did for them.",
            ("result",),
            registry=self.registry,
        )
        for outcome in Outcome:
            self._requests.labels(outcome.value)
        if kept() is None:
            return
        entries, nbytes = (
            Gauge(f"roundhouse_response_cache_{name}", text, registry=self.registry)
            for name, text in (
                ("entries", "Answers in the response cache."),
                ("bytes", "Bytes of the answers in the response cache."),
            )
        )
        entries.set_function(lambda: (kept() or NOTHING).entries)
        nbytes.set_function(lambda: (kept() or NOTHING).nbytes)

    def count(self, outcome: Outcome) -> None:
        """Count one request."""
        self.counts[outcome] += 1
        self._requests.labels(outcome.value).inc()
