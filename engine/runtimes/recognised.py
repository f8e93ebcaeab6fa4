"""What a runtime makes of a repository that it can serve: the entry of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Recognised:
    """A model for the configuration."""

    runtime: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, model_id: str, source: str) -> dict[str, Any]:
        """The entry of the configuration, without what is the default anyway."""
        entry: dict[str, Any] = {"id": model_id}
        for name, value in (("runtime", self.runtime), ("task", self.task)):
            if value != ModelConfig.model_fields[name].default:
                entry[name] = value
        entry["source"] = source
        if self.options:
            entry["options"] = dict(self.options)
        return entry
