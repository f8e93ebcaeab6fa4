"""The models as Ollama lists them: what there is, what is loaded, and what one can do."""

from __future__ import annotations

import hashlib
import math
import time
from typing import TYPE_CHECKING, Any

from engine.catalog.model_files import files_of
from server.ollama.abilities import EMBED, GENERATE, TEXT_TASKS, Abilities, AbilityReader
from server.ollama.clock import written

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine import Engine
    from engine.route_config import RouteConfig
    from engine.status import EngineStatus, ModelStatus

FOR_EVER_S = 100 * 365 * 86_400.0
"""Ollama writes "forever" for a time that is further away than twenty years."""
FORMAT = "safetensors"
ROUTE = "route"


class Listing:
    """Ollama's lists of the models of an engine."""

    def __init__(self, engine: Engine, reader: AbilityReader) -> None:
        self._engine = engine
        self._reader = reader

    def tags(self, status: EngineStatus) -> list[dict[str, Any]]:
        """Every name of a model for text or embeddings, and every route to one. Reads the disk."""
        config = self._engine.config
        created = {each.id: float(each.created) for each in status.models}
        found = []
        for model in config.models:
            if model.task in TEXT_TASKS:
                about = {
                    "modified_at": written(self._modified_at(model, created[model.id])),
                    "size": sum(each.nbytes for each in files_of(model, config)),
                    "digest": self.digest(model),
                    "details": self.details(model),
                }
                adapters = [f"{model.id}:{each}" for each in self._engine.loras.adapters(model)]
                names = (*model.names, *adapters)
                found += [{"name": name, "model": name, **about} for name in names]
        return found + [
            {"name": route.id, "model": route.id, "modified_at": written(0.0), **_of_route(route)}
            for route in config.routes
            if any(model.task in TEXT_TASKS for model in self._engine.router.models(route.id))
        ]

    def running(self, status: EngineStatus) -> list[dict[str, Any]]:
        """The models that are on the device, whatever they are for."""
        on_gpu = status.device_kind != "cpu"
        return [
            {
                "name": model.id,
                "model": model.id,
                "size": sum(block.nbytes for block in model.blocks) or model.device_bytes,
                "digest": self.digest(self._engine.config.find(model.id)),
                "details": self.details(self._engine.config.find(model.id)),
                "expires_at": written(time.time() + _stays_s(model)),
                "size_vram": model.device_bytes if on_gpu else 0,
                "context_length": self._context(self._engine.config.find(model.id)) or 0,
            }
            for model in status.models
            if model.device_bytes
        ]

    def show(self, name: str, status: EngineStatus) -> dict[str, Any]:
        """What is known of a model or a route."""
        if name in self._engine.router:
            route = self._engine.router.find(name)
            return {
                "modelfile": "".join(f"FROM {each}\n" for each in route.choose),
                "parameters": "",
                "template": "",
                "details": _of_route(route)["details"],
                "model_info": {"general.architecture": ROUTE},
                "capabilities": ["completion"],
                "modified_at": written(0.0),
            }
        model = self._engine.config.find(name)
        facts = self._reader.facts(model)
        family = (facts.family if facts else "") or model.runtime
        info: dict[str, Any] = {"general.architecture": family, "general.basename": model.id}
        if facts is not None:
            for key, value in (
                ("general.parameter_count", facts.parameters),
                (f"{family}.context_length", self._context(model)),
                (f"{family}.embedding_length", facts.embedding_length),
            ):
                if value is not None:
                    info[key] = value
        context = self._context(model)
        created = next(float(each.created) for each in status.models if each.id == model.id)
        return {
            "modelfile": f"FROM {model.id}\n",
            "parameters": f"num_ctx {context}" if context else "",
            "template": facts.template if facts else "",
            "details": self.details(model),
            "model_info": info,
            "capabilities": _capabilities(model, Abilities.of(model, facts)),
            "modified_at": written(self._modified_at(model, created)),
        }

    def details(self, model: ModelConfig) -> dict[str, Any]:
        """Ollama's `details`. What is not known is empty."""
        facts = self._reader.facts(model)
        family = (facts.family if facts else "") or model.runtime
        chosen = model.options.get("quantization")
        parameters = facts.parameters if facts else None
        return {
            "parent_model": "",
            "format": FORMAT if facts and facts.family else "",
            "family": family,
            "families": [family],
            "parameter_size": _count(parameters) if parameters else "",
            "quantization_level": str(chosen).upper()
            if chosen
            else (facts.quantization if facts else ""),
        }

    def digest(self, model: ModelConfig) -> str:
        """SHA-256 of what names the files: their source, and on a hub the commit."""
        facts = self._reader.facts(model)
        return _sha256(model.source, facts.folder.name if facts else "")

    def _modified_at(self, model: ModelConfig, otherwise: float) -> float:
        facts = self._reader.facts(model)
        return facts.modified_at if facts else otherwise

    def _context(self, model: ModelConfig) -> int | None:
        facts = self._reader.facts(model)
        chosen = model.options.get("max_model_len") or model.options.get("context")
        return chosen if isinstance(chosen, int) else facts.context if facts else None


def _capabilities(model: ModelConfig, abilities: Abilities) -> list[str]:
    if model.task == EMBED:
        return ["embedding"]
    if model.task != GENERATE:
        return [model.task]
    named = (
        ("tools", abilities.tools),
        ("thinking", abilities.thinking),
        ("vision", abilities.vision),
    )
    return ["completion", *(name for name, able in named if able)]


def _of_route(route: RouteConfig) -> dict[str, Any]:
    return {
        "size": 0,
        "digest": _sha256(ROUTE, route.id, *route.choose),
        "details": {
            "parent_model": "",
            "format": "",
            "family": ROUTE,
            "families": [ROUTE],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def _stays_s(model: ModelStatus) -> float:
    """Seconds until an idle model leaves. One that is in use stays for all of its time."""
    if model.pinned or math.isinf(model.keep_alive_s):
        return FOR_EVER_S
    return max(0.0, model.keep_alive_s - (model.idle_s or 0.0))


def _count(number: int) -> str:
    """A number of weights, as in `7.6B` and `135M`."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
