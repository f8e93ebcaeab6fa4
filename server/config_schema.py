"""The JSON Schema of the configuration file."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaValue, models_json_schema

from engine.config import EngineConfig, ModelConfig
from engine.runtimes.registry import REGISTRY, runtime_class
from server.json_schema import SchemaGenerator
from server.settings import ServerSettings, read_cache, split_commas
from server.vector_store_config import VectorStoreConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _list_schema(items: Any) -> JsonSchemaValue:
    text = {"type": "string", "description": "Items separated by commas."}
    return {"anyOf": [items, text, {"type": "null"}]}


def _cache_schema(text: Any) -> JsonSchemaValue:
    # Some parsers of YAML take `off` for false.
    return {"anyOf": [text, {"type": "boolean"}]}


class _Generator(SchemaGenerator):
    parsers = MappingProxyType(
        {
            **SchemaGenerator.parsers,
            split_commas: _list_schema,
            read_cache: _cache_schema,
        }
    )


def config_schema() -> dict[str, Any]:
    """The schema of the whole file: `engine`, `server`, and `models` with options by runtime."""
    runtimes = {name: runtime_class(name) for name in sorted(REGISTRY)}
    options = {name: runtime.Options for name, runtime in runtimes.items()}
    kinds: list[type[BaseModel]] = [
        EngineConfig,
        ServerSettings,
        VectorStoreConfig,
        ModelConfig,
        *options.values(),
    ]
    references, document = models_json_schema(
        [(kind, "validation") for kind in kinds], schema_generator=_Generator
    )
    definitions: dict[str, Any] = document["$defs"]
    engine = definitions["EngineConfig"]
    del engine["properties"]["models"]
    engine["required"].remove("models")
    model = definitions["ModelConfig"]
    model["properties"]["runtime"]["enum"] = [*options]
    tasks = {task for runtime in runtimes.values() for task in runtime.tasks}
    model["properties"]["task"]["enum"] = sorted(tasks)
    model["properties"]["options"] = {
        "description": "The options of the runtime.",
        "type": "object",
    }
    del definitions["ServerSettings"]["properties"]["vector_stores"]
    del definitions["MemoryBudget"]  # what a budget becomes, not what it is written as
    model["allOf"] = [
        # A model without `runtime` matches the default's condition only, as that needs no key.
        {
            "if": {
                "properties": {"runtime": {"const": name}},
                "required": []
                if name == ModelConfig.model_fields["runtime"].default
                else ["runtime"],
            },
            "then": {"properties": {"options": references[kind, "validation"]}},
        }
        for name, kind in options.items()
    ]
    return {
        "$schema": DIALECT,
        "title": "Configuration of Roundhouse",
        "type": "object",
        "properties": {
            "engine": _section("EngineConfig", "How the engine shares the device among models."),
            "server": _section("ServerSettings", "Where the server listens, and who may use it."),
            "vector_stores": _section("VectorStoreConfig", "What /v1/vector_stores use."),
            "models": {
                "description": "The models that can be requested.",
                "type": "array",
                "items": references[ModelConfig, "validation"],
                "minItems": 1,
            },
        },
        "required": ["models"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def _section(definition: str, description: str) -> dict[str, Any]:
    reference = {"$ref": f"#/$defs/{definition}"}
    return {"description": description, "anyOf": [reference, {"type": "null"}]}
