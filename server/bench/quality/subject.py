"""A model that is judged, how it computes, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.config import ModelConfig
from engine.runtimes.registry import options_of
from engine.runtimes.vllm.dtype import run_dtype
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.whisper.options import WhisperOptions, run_compute_type
from server.bench.quality.measure import Measure

PRECISIONS = ("dtype", "compute_type", "quantization", "kv_cache_dtype")
"""Options that say in which numbers a model computes."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its measures."""

    model: str
    task: str
    source: str
    precision: Mapping[str, str]
    """Of `PRECISIONS` what the model has."""
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = field(default=())
    """What was not measured, and why."""

    @property
    def numbers(self) -> str:
        """The precision in one phrase."""
        return ", ".join(
            value if "type" in name else f"{name} {value}" for name, value in self.precision.items()
        )


def precision_of(model: ModelConfig, device: str) -> dict[str, str]:
    """The options of `PRECISIONS` that are set. `auto` is resolved where the device is known."""
    options = options_of(model)
    found = {
        name: str(value)
        for name in PRECISIONS
        if (value := getattr(options, name, None)) is not None
    }
    if isinstance(options, VllmOptions) and device:
        found["dtype"] = run_dtype(model, device)
    if isinstance(options, WhisperOptions) and device:
        found["compute_type"] = run_compute_type(options, device)
    return found
