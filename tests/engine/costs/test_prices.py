"""Prices: the option goes before the tables, and what no table has is not free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ModelConfig
from engine.costs.prices import MEDIA_PRICES, UNITS, Prices, Rates, machine_rate, token_price
from engine.errors import ConfigError
from engine.runtimes.remote.options import Price
from engine.usage import Usage

OPENAI = "https://api.openai.com/v1"
MILLION = Usage(input_tokens=1_000_000, output_tokens=1_000_000)


def config(*models: dict[str, Any], **costs: Any) -> EngineConfig:
    return EngineConfig.model_validate({"models": list(models), "costs": costs})


def remote(name: str = "cloud", source: str = OPENAI, **options: Any) -> dict[str, Any]:
    return {"id": name, "runtime": "remote", "source": source, "options": options}


def cost(usage: Usage, model: dict[str, Any]) -> float:
    one = config(model)
    price = Prices(one).of(one.models[0])
    assert price is not None
    return price.cost(usage)


def test_the_option_goes_before_the_tables() -> None:
    price = {"input": 1.0, "output": 3, "cached_input": 0.5}
    model = remote(model="gpt-4o", price=price)
    assert cost(MILLION, model) == 4.0
    assert cost(Usage(input_tokens=1_000_000, cached_tokens=400_000), model) == pytest.approx(0.8)


def test_cached_input_costs_as_other_input_if_nothing_is_said() -> None:
    usage = Usage(input_tokens=1_000_000, cached_tokens=1_000_000)
    assert cost(usage, remote(price={"input": 2.0})) == 2.0


@pytest.mark.parametrize(
    ("price", "usage", "dollars"),
    [
        ({"image": 0.04}, Usage(images=3), 0.12),
        ({"second": 0.01}, Usage(heard_s=60.0), 0.6),
        ({"second": 0.1}, Usage(video_s=5.0), 0.5),
        ({"second": 0.01}, Usage(spoken_s=2.0), 0.02),
        ({"character": 15.0}, Usage(characters=100_000), 1.5),
        ({"request": 0.01, "input": 1.0}, Usage(input_tokens=1_000_000), 1.01),
        ({"request": 0.01}, Usage(images=2), 0.01),
        ({"request": 0.01}, Usage(), 0.0),  # it never ran
    ],
)
def test_every_unit_has_its_price(price: dict[str, float], usage: Usage, dollars: float) -> None:
    assert cost(usage, remote(price=price)) == pytest.approx(dollars)


def test_every_key_of_the_option_is_known() -> None:
    assert set(UNITS) == set(Price.model_fields)


def test_an_empty_option_is_free_and_an_unknown_model_is_not() -> None:
    one = config(remote("given", price={}), remote("unknown", "http://10.0.0.1/v1", model="my-own"))
    prices = Prices(one)
    given, unknown = (prices.of(model) for model in one.models)
    assert given is not None and given.free
    assert unknown is None
    (line,) = prices.load()
    assert "'unknown'" in line


@pytest.mark.parametrize("price", [{"input": -1}, {"input": "much"}, {"inputs": 1}])
def test_a_wrong_option_is_an_error_that_names_it(price: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"models\[cloud\]\.options\.price\.inputs?:"):
        cost(MILLION, remote(price=price))


def test_tokens_are_priced_by_the_tables() -> None:
    assert cost(MILLION, remote(model="gpt-4o-mini")) == pytest.approx(0.15 + 0.60)
    cached = Usage(input_tokens=1_000_000, cached_tokens=1_000_000)
    assert cost(cached, remote(model="gpt-4o-mini")) == pytest.approx(0.075)
    groq = remote(source="https://api.groq.com/openai/v1", model="llama-3.3-70b-versatile")
    assert cost(MILLION, groq) == pytest.approx(0.59 + 0.79)


def test_the_name_tells_where_the_provider_is_unknown() -> None:
    proxied = remote(source="http://proxy.internal/v1", model="gpt-4o-mini")
    assert cost(MILLION, proxied) == pytest.approx(0.75)


def test_rates_of_a_table_agree_with_its_package() -> None:
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price
    from genai_prices.data_snapshot import get_snapshot

    usage = Usage(input_tokens=100_000, cached_tokens=30_000, output_tokens=7_000)
    tokens = Tokens(input_tokens=100_000, cache_read_tokens=30_000, output_tokens=7_000)
    compared = 0
    for provider in get_snapshot().providers:
        if provider.id in ("openai", "groq", "google", "anthropic", "deepseek"):
            for model in provider.models:
                price = token_price(model.id, None)
                if price is not None:
                    expected = float(calc_price(tokens, model.id).total_price)
                    assert price.cost(usage) == pytest.approx(expected), model.id
                    compared += isinstance(price, Rates)
    assert compared > 100


@pytest.mark.parametrize(
    ("name", "usage", "dollars"),
    [
        ("whisper-1", Usage(heard_s=60), 0.006),
        ("tts-1", Usage(characters=1_000_000), 15),
        ("openai/gpt-image-1", Usage(images=1), 0.042),
        ("gpt-4o-mini-tts-2025-12-15", Usage(spoken_s=60), 0.015),
        ("sora-2", Usage(video_s=4), 0.4),
    ],
)
def test_media_are_priced_by_the_file(name: str, usage: Usage, dollars: float) -> None:
    assert cost(usage, remote(model=name)) == pytest.approx(dollars)


def test_the_file_says_whence_and_when_and_has_only_known_units() -> None:
    document = json.loads(MEDIA_PRICES.read_text())
    assert document["source"].startswith("https://github.com/BerriAI/litellm")
    assert document["date"] == "2026-08-01"
    assert [*document["models"]] == sorted(document["models"])
    assert all(rates and not Rates.of(rates, "").free for rates in document["models"].values())


def test_the_compared_model_is_a_name_of_the_tables_or_a_configured_one() -> None:
    mine = remote("mine", price={"input": 7.0})
    compare = {"generate": "gpt-4o-mini", "embed": "mine", "image": "dall-e-3", "speech": "what"}
    prices = Prices(config(mine, compare=compare))
    compared = {task: prices.compared(task) for task in (*compare, "video")}
    found = {
        task: None if price is None else price.cost(MILLION) for task, price in compared.items()
    }
    assert found == {
        "generate": pytest.approx(0.75),
        "embed": 7.0,
        "image": 0.0,
        "speech": None,
        "video": None,
    }
    assert prices.load() == ["costs.compare.speech: no table has the price of 'what'"]


def test_a_machine_costs_its_rent_and_its_power() -> None:
    costs = config(remote(), price_per_hour=1.8, watts=500, price_per_kwh=0.4).costs
    assert machine_rate(costs) * 3600 == pytest.approx(1.8 + 0.2)


def test_the_tables_are_read_late() -> None:
    code = "import sys, engine.engine; print({'genai_prices', 'httpx2'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_one_model_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = config(remote(model="whisper-1"))
    prices = Prices(one)
    first = prices.of(one.models[0])
    monkeypatch.setattr("engine.costs.prices._find", lambda _: pytest.fail("once more"))
    assert prices.of(one.models[0]) is first
    assert isinstance(one.models[0], ModelConfig)
