"""The models of the configurations for real machines, and the repositories that they read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.catalog.downloads import sources_of
from engine.config import ModelConfig, engine_config, engine_fields, read_sections
from engine.runtimes.registry import RUNTIMES

CONFIGS = Path(__file__).parents[2] / "configs"
MACHINES = ("cpu", "gpu-8gb", "gpu-24gb", "gpu-80gb")


def configured(*runtimes: str) -> Iterator[ModelConfig]:
    """Each model once, however many configurations name it; of these runtimes, or of all."""
    seen: list[ModelConfig] = []
    for machine in MACHINES:
        sections = read_sections(
            CONFIGS / f"{machine}.yaml", {}, {"engine": engine_fields(), "server": []}
        )
        for model in engine_config(sections, RUNTIMES).models:
            bare = model.model_copy(update={"aliases": ()})
            if bare not in seen and (not runtimes or model.runtime in runtimes):
                seen.append(bare)
                yield bare


def repositories(*runtimes: str) -> dict[str, ModelConfig]:
    """The hub's repositories that they read, each with the first model that reads it."""
    found: dict[str, ModelConfig] = {}
    for model in configured(*runtimes):
        for source in sources_of(model):
            found.setdefault(source.repo, model)
    return found
