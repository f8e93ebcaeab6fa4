"""What the models of providers cost.

The option `price` of a remote model goes before all tables. Tokens are priced by the package
`genai-prices`, whose tables are in its wheel. What it lacks is in `media_prices.json`: images,
speech, transcription, video. Nothing here uses the network.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from engine.config import EngineConfig, ModelConfig
from engine.cost_config import CostConfig
from engine.costs.provider import LOCAL, provider_of
from engine.errors import ConfigError, ModelNotFound
from engine.usage import Usage

log = logging.getLogger(__name__)

MILLION = 1e6
UNITS = ("input", "output", "cached_input", "image", "second", "character", "request")
"""The keys of the option `price`."""

MEDIA_PRICES = Path(__file__).with_name("media_prices.json")
_ENTRIES = {"input": "input_mtok", "output": "output_mtok", "cached_input": "cache_read_mtok"}
"""What the package calls them."""
_DATED = re.compile(r"-\d{4}-\d{2}-\d{2}$")


class Price(Protocol):
    """What one model costs."""

    @property
    def free(self) -> bool:
        """Whether nothing of it costs anything."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: unknown."""

    def cost(self, usage: Usage) -> float:
        """The dollars for a usage."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A price for each unit, in dollars."""

    input: float = 0.0
    """A million tokens."""
    output: float = 0.0
    """A million tokens."""
    cached_input: float | None = None
    """A million tokens; None: as other input."""
    image: float = 0.0
    """A picture."""
    second: float = 0.0
    """A second of a recording, of speech, or of a video."""
    character: float = 0.0
    """A million characters of a text that is spoken."""
    request: float = 0.0
    """A request, whatever it is."""
    context: int | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str) -> Rates:
        """The rates of the option `price`.

        Raises:
            ConfigError: naming the key at fault.

        """
        known: dict[str, float | None] = {}
        for name, value in raw.items():
            if name not in UNITS:
                raise ConfigError(f"{where}.{name}: unknown key")
            if value is None:
                continue
            try:
                known[name] = float(value)
            except (TypeError, ValueError):
                raise ConfigError(f"{where}.{name}: expected a number of dollars") from None
            if not 0 <= float(value) < float("inf"):
                raise ConfigError(f"{where}.{name}: expected 0 or more dollars")
        return cls(**known)  # type: ignore[arg-type]

    @property
    def free(self) -> bool:
        """Whether nothing costs anything."""
        return not any(getattr(self, name) for name in UNITS)

    def cost(self, usage: Usage) -> float:
        """The dollars for a usage."""
        cached = min(usage.cached_tokens, usage.input_tokens)
        cached_rate = self.input if self.cached_input is None else self.cached_input
        seconds = usage.heard_s + usage.spoken_s + usage.video_s
        texts = usage.input_tokens + usage.output_tokens + usage.characters
        return (
            (self.request if texts or usage.images or seconds else 0.0)  # else it never ran
            + (usage.input_tokens - cached) * self.input / MILLION
            + cached * cached_rate / MILLION
            + usage.output_tokens * self.output / MILLION
            + usage.characters * self.character / MILLION
            + usage.images * self.image
            + seconds * self.second
        )


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A model of `genai-prices` whose prices depend on the length of the prompt, or on the hour.

    The package computes each, which takes a tenth of a millisecond.
    """

    name: str
    base_url: str | None
    context: int | None
    free: bool = False

    def cost(self, usage: Usage) -> float:
        """The dollars for the tokens of a usage."""
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price

        if not (usage.input_tokens or usage.output_tokens):
            return 0.0
        tokens = Tokens(
            input_tokens=usage.input_tokens,
            cache_read_tokens=min(usage.cached_tokens, usage.input_tokens),
            output_tokens=usage.output_tokens,
        )
        try:
            return float(calc_price(tokens, self.name, provider_api_url=self.base_url).total_price)
        except (LookupError, ValueError) as error:
            log.warning("no price of %s: %s", self.name, error)
            return 0.0


def token_price(name: str, base_url: str | None) -> Rates | TokenTable | None:
    """The price of a provider's model in `genai-prices`, if it has one.

    Without a `base_url` the provider is the one that the name belongs to.
    """
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError as error:  # a broken installation must not stop the server
        log.warning("the tables of prices cannot be read: %s", error)
        return None
    tokens = Tokens(input_tokens=1_000, output_tokens=1_000)
    try:
        found = calc_price(tokens, name, provider_api_url=base_url)
    except (LookupError, ValueError):
        return None
    context, always = found.model.context_window, vars(found.model_price)
    known = {unit: always.get(entry) for unit, entry in _ENTRIES.items()}
    varies = isinstance(found.model.prices, list) or always.get("requests_kcount") is not None
    if varies or not all(rate is None or isinstance(rate, Decimal) for rate in known.values()):
        return TokenTable(name, base_url, context)
    rates = {unit: float(rate) for unit, rate in known.items() if rate is not None}
    return Rates(**rates, context=context)


class Prices:
    """The prices of the configured remote models, and of those that answers are compared with."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._found: dict[str, tuple[ModelConfig, Price | None]] = {}
        self._compared: dict[str, Price | None] = {}

    def load(self) -> list[str]:
        """Read the tables for all of them, off the event loop; what is unknown, as sentences."""
        unknown = []
        for model in self._config.models:
            if provider_of(model) != LOCAL and self.of(model) is None:
                unknown.append(
                    f"models: no table has the price of {model.id!r}. What it costs is not counted"
                    " unless its provider reports it; set its option price"
                )
        for task, name in self._config.costs.compare.items():
            if self.compared(task) is None:
                unknown.append(f"costs.compare.{task}: no table has the price of {name!r}")
        return unknown

    def of(self, model: ModelConfig) -> Price | None:
        """The price of a remote model; None if nobody knows it."""
        known = self._found.get(model.id)
        if known is None or known[0] is not model:
            known = self._found[model.id] = (model, _find(model))
        return known[1]

    def compared(self, task: str) -> Price | None:
        """The price of the cloud's model that a task is compared with; None without one."""
        if task not in self._compared:
            name = self._config.costs.compare.get(task)
            self._compared[task] = None if name is None else self._by_name(name)
        return self._compared[task]

    def _by_name(self, name: str) -> Price | None:
        try:
            model = self._config.find(name)
        except ModelNotFound:
            pass
        else:
            if provider_of(model) != LOCAL:
                return self.of(model)
        return _in_tables(name, None)


def machine_rate(costs: CostConfig) -> float:
    """Dollars of a second of this machine's device."""
    return (costs.price_per_hour + costs.watts / 1e3 * costs.price_per_kwh) / 3600


def _find(model: ModelConfig) -> Price | None:
    given = model.options.get("price")
    if isinstance(given, Mapping):
        return Rates.of(given, f"models[{model.id}].options.price")
    return _in_tables(str(model.options.get("model") or model.id), model.source)


def _in_tables(name: str, base_url: str | None) -> Price | None:
    media = media_prices()
    bare = name.rpartition("/")[2].lower()
    for each in (bare, _DATED.sub("", bare)):
        if each in media:
            return media[each]
    # A provider that the package does not know, such as a proxy: then the name alone tells.
    found = token_price(name, base_url) if base_url is not None else None
    return found or token_price(name, None)


@cache
def media_prices() -> Mapping[str, Rates]:
    """The rates in `media_prices.json`, by the name of the model."""
    document = json.loads(MEDIA_PRICES.read_text(encoding="utf-8"))
    return {name: Rates.of(rates, name) for name, rates in document["models"].items()}
