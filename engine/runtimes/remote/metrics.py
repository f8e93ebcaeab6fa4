"""The Prometheus series of providers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from engine.runtimes.remote.breaker import BreakerState
from engine.runtimes.remote.provider import Provider


class ProviderCollector(Collector):
    """Reads the providers at the moment of the scrape."""

    def __init__(self, providers: Callable[[], Iterable[Provider]]) -> None:
        self._providers = providers

    def describe(self) -> Iterable[Metric]:
        """Describe nothing: then registration asks for nothing, only a scrape does."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Calls, retries, breaker, errors, times and limits."""
        calls = CounterMetricFamily(
            "roundhouse_provider_requests",
            "Requests to a provider that ended, by outcome.",
            labels=("provider", "outcome"),
        )
        retries = CounterMetricFamily(
            "roundhouse_provider_retries", "Further attempts after a failure.", labels=("provider",)
        )
        breaker = GaugeMetricFamily(
            "roundhouse_provider_breaker",
            "1 for the state of the breaker.",
            labels=("provider", "state"),
        )
        errors = GaugeMetricFamily(
            "roundhouse_provider_error_rate", "Failures in the last minute.", labels=("provider",)
        )
        seconds = GaugeMetricFamily(
            "roundhouse_provider_first_byte_seconds",
            "Seconds to the first byte of the last answers.",
            labels=("provider", "quantile"),
        )
        left = GaugeMetricFamily(
            "roundhouse_provider_limit_left",
            "What is left of a limit.",
            labels=("provider", "model", "limit"),
        )
        for provider in self._providers():
            status = provider.status
            for outcome, count in sorted(provider.outcomes.items()):
                calls.add_metric((provider.name, outcome), count)
            retries.add_metric((provider.name,), provider.retries)
            for state in BreakerState:
                breaker.add_metric((provider.name, state.value), float(state == status.breaker))
            if status.error_rate is not None:
                errors.add_metric((provider.name,), status.error_rate)
            for quantile, value in (
                ("0.5", status.first_byte_p50_s),
                ("0.95", status.first_byte_p95_s),
            ):
                if value is not None:
                    seconds.add_metric((provider.name, quantile), value)
            for model in status.models:
                for limit, number in (
                    ("requests", model.requests_left),
                    ("tokens", model.tokens_left),
                ):
                    if number is not None:
                        left.add_metric((provider.name, model.model, limit), number)
        yield from (calls, retries, breaker, errors, seconds, left)


def provider_registry(providers: Callable[[], Iterable[Provider]]) -> CollectorRegistry:
    """A registry of these series."""
    registry = CollectorRegistry()
    registry.register(ProviderCollector(providers))
    return registry
