"""The engine's own Prometheus series."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.status import EngineStatus

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class StatusCollector(Collector):
    """Gauges read from the engine's status at the moment of the scrape."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Describe nothing: then registration does not ask for the status, only a scrape does."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The ledger, the residency and the queue at this moment."""
        status = self._status()
        ledger = status.ledger
        yield GaugeMetricFamily(
            "roundhouse_capacity_bytes",
            "Device bytes that may be granted now.",
            value=ledger.capacity_bytes,
        )
        yield GaugeMetricFamily(
            "roundhouse_granted_bytes", "Device bytes granted.", value=ledger.granted_bytes
        )
        yield GaugeMetricFamily(
            "roundhouse_external_bytes",
            "Device bytes in use that no model accounts for.",
            value=ledger.external_bytes,
        )
        yield GaugeMetricFamily(
            "roundhouse_host_budget_bytes",
            "Host memory that copies of weights, and prefix caches, may take.",
            value=status.host.budget_bytes,
        )
        yield GaugeMetricFamily(
            "roundhouse_host_used_bytes",
            "Host memory that copies of weights, and prefix caches, take.",
            value=status.host.used_bytes,
        )
        prefixes = GaugeMetricFamily(
            "roundhouse_host_prefix_bytes",
            "Host memory of a prefix cache that waits for its KV cache.",
            labels=("model",),
        )
        for model in status.models:
            prefixes.add_metric((model.id,), status.host.prefix_bytes.get(model.id, 0))
        yield prefixes
        resident = GaugeMetricFamily(
            "roundhouse_resident_bytes",
            "Bytes of a model's parts, by tier.",
            labels=("model", "part", "tier"),
        )
        leases = GaugeMetricFamily(
            "roundhouse_leases", "Requests running on a model.", labels=("model",)
        )
        waiting = GaugeMetricFamily(
            "roundhouse_queue_length", "Requests waiting for a model.", labels=("model",)
        )
        for model in status.models:
            for block in model.blocks:
                resident.add_metric((model.id, block.name, block.tier), block.nbytes)
            leases.add_metric((model.id,), model.leases)
            waiting.add_metric((model.id,), model.waiting)
        restarts = status.restarts
        yield CounterMetricFamily(
            "roundhouse_restarts",
            "Times this process was started again since the command was.",
            value=restarts.count,
        )
        if restarts.at is not None:
            reason = GaugeMetricFamily(
                "roundhouse_last_restart_timestamp_seconds",
                "When it was started again last, and why.",
                labels=("reason",),
            )
            reason.add_metric((restarts.reason or "",), restarts.at)
            yield reason
        yield resident
        yield leases
        yield waiting


class EngineMetrics:
    """Counts the events of the scheduler and the seconds of requests."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(StatusCollector(status))
        self._loads = Counter(
            "roundhouse_loads",
            "Loads of a model that ended, by outcome.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self._unloads = Counter(
            "roundhouse_evictions",
            "Times a model, or blocks of it, left the device.",
            ("model",),
            registry=self.registry,
        )
        self._load_seconds = Histogram(
            "roundhouse_load_seconds",
            "Disk to ready.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._wake_seconds = Histogram(
            "roundhouse_wake_seconds",
            "Host copy to ready.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._residual_bytes = Gauge(
            "roundhouse_unload_residual_bytes",
            "Device bytes that the last unload of a model did not give back.",
            ("model",),
            registry=self.registry,
        )
        self._unload_seconds = Histogram(
            "roundhouse_eviction_seconds",
            "Decision to bytes free.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "roundhouse_refusals",
            "Requests refused before they ran.",
            ("model",),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "roundhouse_request_seconds",
            "Seconds of a request by phase: queue, load, run.",
            ("model", "phase"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._began: dict[str, float] = {}

    def residual(self, model_id: str, nbytes: int) -> None:
        """Take the bytes that an unload did not free."""
        self._residual_bytes.labels(model_id).set(nbytes)

    def count(self, event: SchedulerEvent, now: float) -> None:
        """Take one scheduler event; `now` is the scheduler's clock in seconds."""
        match event.kind:
            case EventKind.LOAD | EventKind.WAKE | EventKind.PARK | EventKind.UNLOAD:
                self._began[event.model] = now
            case EventKind.LOADED:
                self._loads.labels(event.model, "ok").inc()
                self._load_seconds.labels(event.model).observe(now - self._began[event.model])
            case EventKind.WOKEN:
                self._wake_seconds.labels(event.model).observe(now - self._began[event.model])
            case EventKind.LOAD_FAILED:
                self._loads.labels(event.model, "failed").inc()
            case EventKind.UNLOADED | EventKind.PARKED:
                self._unloads.labels(event.model).inc()
                self._unload_seconds.labels(event.model).observe(now - self._began[event.model])
            case EventKind.REFUSE:
                self._refusals.labels(event.model).inc()
