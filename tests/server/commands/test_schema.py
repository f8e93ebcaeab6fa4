"""`roundhouse schema`: what the schema takes is what the configuration takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from typer.testing import CliRunner

from engine.config import EngineConfig, ModelConfig
from engine.runtimes.registry import REGISTRY, runtime_class
from engine.units import MemoryBudget, parse_duration, parse_size
from server.commands import cli
from server.json_schema import SchemaGenerator, field_docstrings
from server.settings import VECTOR_STORES, ServerSettings
from server.vector_store_config import VectorStoreConfig

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA_FILE = CONFIGS / "schema.json"

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["schema"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.fixture(scope="module")
def accepts(schema: dict[str, Any]) -> Callable[[Any], bool]:
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    return lambda document: validator.is_valid(document)


def with_model(**fields: Any) -> dict[str, Any]:
    return {"models": [{"id": "any", "source": "any", **fields}]}


def test_the_committed_file_is_what_the_command_prints(schema: dict[str, Any]) -> None:
    committed = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert committed == schema, "run: roundhouse schema > configs/schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_names_the_schema_and_fits_it(
    path: Path, accepts: Callable[[Any], bool]
) -> None:
    text = path.read_text(encoding="utf-8")
    mark, _, name = text.splitlines()[0].rpartition("=")
    assert mark == "# yaml-language-server: $schema"
    assert (path.parent / name).resolve() == SCHEMA_FILE
    assert accepts(yaml.safe_load(text))


@pytest.mark.parametrize(
    "document",
    [
        {**with_model(), "engines": {}},
        {**with_model(), "engine": {"memmory": "80%"}},
        {**with_model(), "server": {"prot": 80}},
        with_model(sauce="any"),
        with_model(options={"max_model_length": 512}),
        with_model(runtime="vllm", options={"voice": "alloy"}),
        with_model(runtime="kokoro", options={"max_model_len": 512}),
        with_model(runtime="diffusers", options={"low": {"step": 4, "guidance": 0}}),
        with_model(runtime="vlm"),
        with_model(task="speak"),
        {"models": []},
        {"engine": {}},
        {"models": [{"id": "any"}]},
    ],
)
def test_what_the_configuration_refuses(
    document: dict[str, Any], accepts: Callable[[Any], bool]
) -> None:
    assert not accepts(document)


@pytest.mark.parametrize(
    "document",
    [
        with_model(),
        with_model(options={"max_model_len": 512, "kv_cache": "1GiB"}),
        with_model(runtime="kokoro", task="speech", options={"voice": "alloy"}),
        {**with_model(keep_alive=0, pin=True), "engine": None, "server": None},
        {**with_model(), "server": {"api_keys": "a,b", "allowed_media_hosts": ["example.org"]}},
        {**with_model(), "server": {"api_keys": None}},
    ],
)
def test_what_the_configuration_takes(
    document: dict[str, Any], accepts: Callable[[Any], bool]
) -> None:
    assert accepts(document)


VALUES: list[Any] = [
    *(0, 1, 1024, -1, 1.5, True, None, "", "1", "12 b", "1.5 kb", "64MiB", "8 gB", "1Ti", "3tIb"),
    *("-1", "1e3", "MiB", "1 XB", "90s", "5 m", "500ms", "1H", "7d", "1.5h", "1w", "forever"),
    *("1h30m", " 1d 2h ", "1 h30m", "1h30", "90s500ms", "h30m"),
    *(" Forever ", "for ever", "80%", " 5 %", "80 %%", "%", [], {}),
]


@pytest.mark.parametrize("parse", [parse_size, parse_duration, MemoryBudget.parse])
def test_sizes_and_durations_are_those_that_can_be_read(parse: Callable[[Any], Any]) -> None:
    written = SchemaGenerator.parsers[parse]({})
    for value in VALUES:
        try:
            parse(value)
        except ValueError:
            readable = False
        else:
            readable = True
        assert Draft202012Validator(written).is_valid(value) is readable, value


def test_a_bound_of_the_bytes_is_one_of_the_schema(accepts: Callable[[Any], bool]) -> None:
    assert accepts({**with_model(), "engine": {"max_data": 1}})
    assert not accepts({**with_model(), "engine": {"max_data": 0}})
    assert not accepts({**with_model(), "server": {"hang_s": 0.5}})


KINDS: list[type[BaseModel]] = [EngineConfig, ServerSettings, ModelConfig, VectorStoreConfig]
KINDS += [runtime_class(name).Options for name in sorted(REGISTRY)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_is_there_with_its_docstring(
    kind: type[BaseModel], schema: dict[str, Any]
) -> None:
    properties = schema["$defs"][kind.__name__]["properties"]
    assert properties.keys() == kind.model_fields.keys() - {"models", VECTOR_STORES}
    assert not schema["$defs"][kind.__name__]["additionalProperties"]
    texts = field_docstrings(kind)
    assert texts.keys() <= kind.model_fields.keys()
    for name in texts.keys() - {"models", "options"}:
        assert properties[name]["description"] == texts[name]


def test_docstrings_of_a_base_class_are_taken_too() -> None:
    texts = field_docstrings(runtime_class("bark").Options)
    assert "max_chars" in texts
