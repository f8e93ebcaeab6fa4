"""The Prometheus series of costs."""

from __future__ import annotations

from prometheus_client import Counter
from prometheus_client.registry import CollectorRegistry

from engine.usage import Usage

_LABELS = ("model", "provider")


class CostMetrics:
    """Counts by model and provider, both of which the configuration names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._cost = Counter(
            "roundhouse_cost_dollars", "Dollars of requests.", _LABELS, registry=registry
        )
        self._saved = Counter(
            "roundhouse_saved_dollars",
            "Dollars that the model of costs.compare would have cost beyond that.",
            _LABELS,
            registry=registry,
        )
        self._device_s = Counter(
            "roundhouse_device_seconds",
            "Seconds of the device. Runs at the same time share them.",
            _LABELS,
            registry=registry,
        )
        self._tokens = Counter(
            "roundhouse_tokens",
            "Tokens by kind: input (cached included), cached, output.",
            (*_LABELS, "kind"),
            registry=registry,
        )

    def count(
        self, model: str, provider: str, usage: Usage, device_s: float, cost: float, saved: float
    ) -> None:
        """Take one request."""
        self._cost.labels(model, provider).inc(cost)
        # A counter cannot fall: `GET /v1/engine/usage` has the losses as well.
        self._saved.labels(model, provider).inc(max(0.0, saved))
        self._device_s.labels(model, provider).inc(max(0.0, device_s))
        for kind, tokens in (
            ("input", usage.input_tokens),
            ("cached", usage.cached_tokens),
            ("output", usage.output_tokens),
        ):
            if tokens > 0:
                self._tokens.labels(model, provider, kind).inc(tokens)
