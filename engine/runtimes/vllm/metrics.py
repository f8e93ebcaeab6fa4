"""vLLM's metric series, for several engines side by side, recorded some ten times a second.

vLLM registers its series again for every engine, and removes those of the engine before. Here each
series is made once, in our registry. The label `model_name` distinguishes the engines, and
counters continue across reloads.

vLLM records each step on its own. That takes some forty calls, and one more for each token. Here
the steps of a tenth of a second are added up and recorded once.

Importing this module imports vLLM.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import (
    IterationStats,
    MultiModalCacheStats,
    PrefixCacheStats,
    SchedulerStats,
)

RECORDED_S = 0.1
"""How long steps are held, while there are some."""

OF_FEATURES = attrgetter(
    "connector_prefix_cache_stats",
    "kv_cache_eviction_events",
    "spec_decoding_stats",
    "kv_connector_stats",
    "ec_connector_stats",
    "perf_stats",
)
"""Counts of the scheduler that are there only with a feature. They are not summed."""


class BatchHistogram(Histogram):
    """A histogram that takes many values at once."""

    def observe_all(self, values: Sequence[float]) -> None:
        """As `observe` of each."""
        ordered = sorted(values)
        self._sum.inc(sum(ordered))
        below = 0
        for bucket, bound in zip(self._buckets, self._upper_bounds, strict=True):
            upto = bisect_right(ordered, bound)
            if upto > below:
                bucket.inc(upto - below)
                below = upto


_Step: TypeAlias = tuple[SchedulerStats | None, IterationStats | None, MultiModalCacheStats | None]


class _Unobserved:
    """Stands for a series that is observed elsewhere."""

    def observe(self, value: float) -> None:
        """Do nothing."""


def stat_logger(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """The logger class whose series live in `registry`."""
    series: dict[str, Any] = {}

    def made_once(kind: type[Any]) -> Callable[..., Any]:
        def make(name: str, documentation: str, **options: Any) -> Any:
            if name not in series:
                series[name] = kind(name, documentation, registry=registry, **options)
            return series[name]

        return make

    class SharedStatLogger(BatchStatLogger):
        _gauge_cls = staticmethod(made_once(Gauge))
        _counter_cls = staticmethod(made_once(Counter))
        _histogram_cls = staticmethod(made_once(BatchHistogram))

    return SharedStatLogger


class BatchStatLogger(PrometheusStatLogger):  # type: ignore[misc]
    """Holds the counts of some steps and records their sum. Once nothing runs, nothing is held."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It has one value a step, which the sum of several steps has no more.
        self._step_tokens: dict[int, BatchHistogram] = self.histogram_iteration_tokens
        self.histogram_iteration_tokens: Any = dict.fromkeys(self._step_tokens, _Unobserved())
        self._held: list[_Step] = []
        self._recorded_s = 0.0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Count a step of the engine. There is one engine a logger."""
        self._held.append((scheduler_stats, iteration_stats, mm_cache_stats))
        now_s = time.monotonic()
        runs = scheduler_stats is None or scheduler_stats.num_running_reqs
        if not runs or now_s - self._recorded_s >= RECORDED_S:
            self._recorded_s = now_s
            held, self._held = self._held, []
            self._record_sum(held, engine_idx)

    def _record_sum(self, held: Sequence[_Step], engine: int) -> None:
        last: SchedulerStats | None = None
        queries = hits = 0
        total, cache = IterationStats(), MultiModalCacheStats()
        step_tokens: list[int] = []
        for scheduler, iteration, media in held:
            if scheduler is not None:
                queries += scheduler.prefix_cache_stats.queries
                hits += scheduler.prefix_cache_stats.hits
                if last is not None and any(OF_FEATURES(last)):
                    last.prefix_cache_stats = PrefixCacheStats()
                    super().record(last, None, None, engine)
                last = scheduler
            if iteration is not None:
                prompts = iteration.prompt_token_stats
                _add(total, iteration)
                _add(total.prompt_token_stats, prompts)
                step_tokens.append(prompts.computed + iteration.num_generation_tokens)
            if media is not None:
                _add(cache, media)
        if last is not None:
            last.prefix_cache_stats = PrefixCacheStats(queries=queries, hits=hits)
        latencies, total.inter_token_latencies_iter = total.inter_token_latencies_iter, []
        super().record(last, total, cache, engine)
        self.histogram_inter_token_latency[engine].observe_all(latencies)
        self._step_tokens[engine].observe_all(step_tokens)


def _add(total: Any, more: Any) -> None:
    """Add counts to counts of the same kind: numbers and lists."""
    for name, value in vars(more).items():
        if type(value) is int:
            setattr(total, name, getattr(total, name) + value)
        elif type(value) is list:
            getattr(total, name).extend(value)
