"""One trace under several policies on the same modelled machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config import EngineConfig
from engine.simulation.baselines import fifo_lru
from engine.simulation.clairvoyant import Clairvoyant, clairvoyant
from engine.simulation.driver import simulate
from engine.simulation.outcome import Move, Outcome
from engine.simulation.traces import Trace, TracedModel

OURS = "roundhouse"
FIFO_LRU = "FIFO + LRU"
FIFO_LRU_DISK = "FIFO + LRU, disk only"
"""Where a trace has host memory: servers without host copies."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of each policy on a trace, and the best possible makespan."""

    trace: Trace
    max_overtake_s: float
    serial_device: bool
    service_s: float
    """The longest that one request takes alone: its model comes in from the host, and it runs."""
    outcomes: Mapping[str, Outcome]
    """By policy; `OURS` and `FIFO_LRU` are always there."""
    clairvoyant: Clairvoyant

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "trace": {
                "name": self.trace.name,
                "requests": len(self.trace.measured),
                "models": len(self.trace.models),
                "model_bytes": sum(model.nbytes for model in self.trace.models.values()),
                "budget_bytes": self.trace.budget_bytes,
                "host_bytes": self.trace.host_bytes,
                "last_arrival_s": self.trace.requests[-1].at_s - self.trace.measured[0].at_s,
            },
            "max_overtake_s": self.max_overtake_s,
            "serial_device": self.serial_device,
            "service_s": self.service_s,
            "policies": {name: _document(each) for name, each in self.outcomes.items()},
            "clairvoyant": asdict(self.clairvoyant),
        }


def compare(trace: Trace, policy: EngineConfig, *, serial_device: bool = False) -> Comparison:
    """Serve a trace by the engine's scheduler, with the limits of `policy`, and by baselines."""
    outcomes = {
        OURS: simulate(trace, policy, serial_device=serial_device),
        FIFO_LRU: fifo_lru(trace, serial_device=serial_device),
    }
    if trace.parks:
        from_disk = trace.on_machine(host_bytes=0)
        outcomes[FIFO_LRU_DISK] = fifo_lru(from_disk, serial_device=serial_device)
    reached_s = [each.makespan_s for each in outcomes.values() if not each.refused]
    best = clairvoyant(trace, min(reached_s, default=None), serial_device=serial_device)
    service_s = max(
        each.run_s + _return_s(trace, trace.models[each.model]) for each in trace.measured
    )
    return Comparison(trace, policy.max_overtake_s, serial_device, service_s, outcomes, best)


def _return_s(trace: Trace, model: TracedModel) -> float:
    return model.load_s if model.wake_s is None or not trace.parks else model.wake_s


def _document(outcome: Outcome) -> dict[str, Any]:
    return {
        "makespan_s": outcome.makespan_s,
        "refused": outcome.refused,
        "swaps": outcome.swaps,
        "moves": {move.value: outcome.count(move) for move in Move},
        "bytes_moved": outcome.bytes_moved,
        "worst_overtake_s": outcome.worst_overtake_s,
        "head_wait": asdict(outcome.head_wait()),
        "waits": asdict(outcome.waits()),
        "waits_by_kind": [
            {"model": model, "priority": priority.name.lower(), **asdict(waits)}
            for (model, priority), waits in outcome.waits_by_kind().items()
        ],
    }
