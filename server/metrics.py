"""Counts HTTP requests, and renders all registries as one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

UNMATCHED = "unmatched"
"""The route of a request without a route, or refused before the search for one."""


class HttpMetrics:
    """The metrics of HTTP requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "roundhouse_http_requests",
            "HTTP requests answered; status 499: the client left before the answer.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "roundhouse_http_request_seconds",
            "Seconds from the head of a request to the last byte of its answer.",
            ("route",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )

    def observe(self, route: str | None, method: str, status: int, elapsed_s: float) -> None:
        """Count one answered request. `route` is the template, never the path itself."""
        route = route or UNMATCHED
        # A client may send any word as a method, and each would stay a series for ever.
        method = method if method in _METHODS else "OTHER"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(elapsed_s)


class _Union(Collector):
    """Several registries as one. Each family comes once, as the text format demands."""

    def __init__(self, registries: Iterable[CollectorRegistry]) -> None:
        self._registries = tuple(registries)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for registry in dict.fromkeys(self._registries):
            for metric in registry.collect():
                family = families.get(metric.name)
                if family is None:
                    family = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                    family.samples = list(metric.samples)
                    families[metric.name] = family
                elif family.type == metric.type:
                    # A scraper rejects the whole document if one series is there twice.
                    known = {(each.name, frozenset(each.labels.items())) for each in family.samples}
                    family.samples += [
                        each
                        for each in metric.samples
                        if (each.name, frozenset(each.labels.items())) not in known
                    ]
        yield from families.values()


def render(registries: Iterable[CollectorRegistry], accept: str) -> tuple[bytes, str]:
    """The document and its content type, in the preferred format of `accept`."""
    encode, content_type = choose_encoder(accept)
    return encode(_Union(registries)), content_type
