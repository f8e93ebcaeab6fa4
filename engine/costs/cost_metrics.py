"""The Prometheus series of costs."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from engine.usage import Usage

_LABELS = ("model", "provider")

_COST, _SAVED, _DEVICE_S, *_TOKENS = range(6)
"""Places in the counts of a model."""

_KINDS = ("input", "cached", "output")


class CostMetrics(Collector):
    """Counts by model and provider, both of which the configuration names.

    They are summed here and made into series when somebody reads them: each request is counted.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts: dict[tuple[str, str], list[float]] = {}
        registry.register(self)

    def count(
        self, model: str, provider: str, usage: Usage, device_s: float, cost: float, saved: float
    ) -> None:
        """Take one request."""
        counts = self._counts.get((model, provider))
        if counts is None:
            counts = self._counts[model, provider] = [0.0] * 6
        counts[_COST] += cost
        # A counter cannot fall: `GET /v1/engine/usage` has the losses as well.
        if saved > 0:
            counts[_SAVED] += saved
        if device_s > 0:
            counts[_DEVICE_S] += device_s
        tokens = (usage.input_tokens, usage.cached_tokens, usage.output_tokens)
        for place, number in zip(_TOKENS, tokens, strict=True):
            if number > 0:
                counts[place] += number

    def collect(self) -> Iterator[Metric]:
        """The series as they stand."""
        for name, text, place in (
            ("roundhouse_cost_dollars", "Dollars of requests.", _COST),
            (
                "roundhouse_saved_dollars",
                "Dollars that the model of costs.compare would have cost beyond that.",
                _SAVED,
            ),
            (
                "roundhouse_device_seconds",
                "Seconds of the device. Runs at the same time share them.",
                _DEVICE_S,
            ),
        ):
            family = CounterMetricFamily(name, text, labels=_LABELS)
            for labels, counts in self._counts.items():
                family.add_metric(labels, counts[place])
            yield family
        tokens = CounterMetricFamily(
            "roundhouse_tokens",
            "Tokens by kind: input (cached included), cached, output.",
            labels=(*_LABELS, "kind"),
        )
        for labels, counts in self._counts.items():
            for kind, place in zip(_KINDS, _TOKENS, strict=True):
                if counts[place]:
                    tokens.add_metric((*labels, kind), counts[place])
        yield tokens
