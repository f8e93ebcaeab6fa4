"""The configurations of docs/cost.md are read as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import EngineConfig, engine_config, engine_fields, read_sections
from engine.cost_config import CostConfig
from engine.costs.prices import Prices
from engine.runtimes.registry import RUNTIMES

PAGE = Path(__file__).parents[3] / "docs" / "cost.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def read(block: str, folder: Path) -> EngineConfig:
    path = folder / "config.yaml"
    path.write_text(block, encoding="utf-8")
    fields = {"engine": engine_fields(), "server": [], "costs": [*CostConfig.model_fields]}
    return engine_config(read_sections(path, {}, fields), RUNTIMES)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_configuration_of_the_page_is_one(block: str, tmp_path: Path) -> None:
    prices = Prices(read(block, tmp_path))
    assert prices.load() == []


def test_the_whole_one_has_what_the_page_says_of_it(tmp_path: Path) -> None:
    config = read(BLOCKS[0], tmp_path)
    local = config.find("local")
    assert (local.fallbacks, local.max_wait) == (("groq", "openai"), 5.0)
    assert [route.id for route in config.routes] == ["gpt-4o-mini"]
    assert [budget.provider for budget in config.budgets] == ["openai", None]
