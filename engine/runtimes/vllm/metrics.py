"""vLLM's metric series, for several engines side by side.

vLLM registers its series again for every engine, and removes those of the engine before. Here each
series is made once, in our registry. The label `model_name` distinguishes the engines, and
counters continue across reloads.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

from vllm.v1.metrics.loggers import PrometheusStatLogger


def stat_logger(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """The logger class whose series live in `registry`."""
    series: dict[str, Any] = {}

    def made_once(kind: type[Any]) -> Callable[..., Any]:
        def make(name: str, documentation: str, **options: Any) -> Any:
            if name not in series:
                series[name] = kind(name, documentation, registry=registry, **options)
            return series[name]

        return make

    class SharedStatLogger(PrometheusStatLogger):  # type: ignore[misc]
        _gauge_cls = staticmethod(made_once(Gauge))
        _counter_cls = staticmethod(made_once(Counter))
        _histogram_cls = staticmethod(made_once(Histogram))

    return SharedStatLogger
