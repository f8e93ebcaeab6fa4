"""The configurations that are shipped: each is read, and its memory plan adds up."""

from __future__ import annotations

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.config import EngineConfig, engine_config, engine_fields, read_sections
from engine.sources import STARTER_PREFIX
from engine.starter import STARTERS
from engine.units import parse_size
from tests.conftest import StarterDir

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
STARTER_CONFIG = next(path for path in CONFIGS if path.stem == "starter")

PLAN_LINE = re.compile(
    r"^# +(?P<id>[\w.-]+) +(?P<billions>[\d.]+) B = +(?P<weights>[\d.]+) GiB +"
    r"(?:none|(?P<token_kib>\d+) KiB, (?P<cache>[\d.]+ \wiB) = (?P<tokens>[\d,]+)) +"
    r"(?P<total>[\d.]+) GiB$",
    re.MULTILINE,
)


def read(path: Path) -> EngineConfig:
    fields = {"engine": engine_fields(), "server": []}
    return engine_config(read_sections(path, {}, fields))


def registered(module: str, table: str) -> set[str]:
    """The names in a table of vLLM's, read from its source: importing vLLM takes ten seconds."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = (Path(vllm.origin).parent / module / "__init__.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == table:
            return set(ast.literal_eval(statement.value))
    raise LookupError(f"vllm.{module} has no {table}")


def test_the_configurations_are_found() -> None:
    assert [path.stem for path in CONFIGS] == [
        "cpu",
        "gpu-24gb",
        "gpu-80gb",
        "gpu-8gb",
        "starter",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_offers_text_and_embeddings(path: Path) -> None:
    assert {model.task for model in read(path).models} == {"generate", "embed"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_named_parsers_exist_in_vllm(path: Path) -> None:
    tool_parsers = registered("tool_parsers", "_TOOL_PARSERS_TO_REGISTER")
    reasoning_parsers = registered("reasoning", "_REASONING_PARSERS_TO_REGISTER")
    options = [model.options for model in read(path).models if model.task == "generate"]
    for each in options:
        assert each.tool_call_parser or each.reasoning_parser
        assert each.tool_call_parser in {None, *tool_parsers}
        assert each.reasoning_parser in {None, *reasoning_parsers}


def test_the_starter_configuration_serves_every_starter_model(starter_dir: StarterDir) -> None:
    models = read(STARTER_CONFIG).models
    assert {model.source for model in models} == {STARTER_PREFIX + name for name in STARTERS}
    for model in models:
        folder = starter_dir(model.source.removeprefix(STARTER_PREFIX))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert model.options.max_model_len == config["max_position_embeddings"]
        assert model.options.dtype == config["dtype"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt-4o-mini", "tiny-llama"),
        ("gpt-4o", "tiny-qwen"),
        ("text-embedding-3-small", "tiny-embed"),
    ],
)
def test_the_starter_configuration_answers_to_well_known_names(name: str, model: str) -> None:
    assert read(STARTER_CONFIG).find(name).id == model


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path != STARTER_CONFIG], ids=lambda path: path.stem
)
def test_the_memory_plan_is_that_of_the_options(path: Path) -> None:
    plan = {line["id"]: line for line in PLAN_LINE.finditer(path.read_text(encoding="utf-8"))}
    models = {model.id: model.options for model in read(path).models}
    assert plan.keys() == models.keys()
    for model_id, options in models.items():
        line = plan[model_id]
        weight_bytes = float(line["billions"]) * 1e9 * (4 if options.dtype == "float32" else 2)
        cache_bytes = 0
        if line["cache"]:
            cache_bytes = parse_size(line["cache"])
            tokens = cache_bytes // (int(line["token_kib"]) * 1024)
            assert options.kv_cache == cache_bytes, model_id
            assert line["tokens"] == f"{tokens:,}", model_id
            # Not equal: vLLM keeps one block of the cache for itself.
            assert tokens > options.max_model_len, model_id
        else:
            assert options.kv_cache is None, model_id
        assert float(line["weights"]) == pytest.approx(weight_bytes / 2**30, abs=0.006), model_id
        total_gib = (weight_bytes + cache_bytes) / 2**30
        assert float(line["total"]) == pytest.approx(total_gib, abs=0.006), model_id
