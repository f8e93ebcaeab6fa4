"""Which model of a route is chosen, and what is said of the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine.caller import Caller
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError, InvalidRequest
from engine.requests import (
    ImageOperation,
    ImageRequest,
    Quality,
    Request,
    SchedulingOptions,
    TextOperation,
    TextRequest,
)
from engine.routing.router import UNKNOWN_WAIT_S, Router
from engine.runtimes.base import Prepared
from engine.section import parse_section
from engine.status import Forecast

HOUR_S = 3600.0


@dataclass
class World:
    """What a router asks: prices, waits, and who refuses what."""

    price: dict[str, float] = field(default_factory=dict)
    eta_s: dict[str, float | None] = field(default_factory=dict)
    too_large: set[str] = field(default_factory=set)
    refuses: dict[str, str] = field(default_factory=dict)

    def router(self, **route: Any) -> Router:
        models = [
            {"id": "small", "source": "none", "quality": 0.3},
            {"id": "large", "source": "none", "quality": 0.6, "aliases": ["big", "taken:best"]},
            {"id": "cloud", "source": "none", "quality": 0.9},
        ]
        raw = {
            "models": models,
            "routes": [{"id": "auto", "choose": ["small", "big", "cloud"], **route}],
            "costs": {"value_of_time": 36.0},  # a cent a second
        }
        return Router(parse_section(EngineConfig, raw, "engine"), self._prepare, self._outlook,
                      lambda model, _: self.price.get(model.id, 0.0))  # fmt: skip

    def _prepare(self, model: ModelConfig, request: Request) -> Prepared:
        assert request.model in model.names
        if model.id in self.refuses:
            raise InvalidRequest(self.refuses[model.id], param="tools")
        return Prepared(request, None)

    def _outlook(self, model: ModelConfig, _request: Request, _working_bytes: int) -> Forecast:
        fits = model.id not in self.too_large
        return Forecast(
            model=model.id, fits=fits, tier="disk", wanted_bytes=1, free_bytes=0, evictions=(),
            move_s=0.0, eta_s=self.eta_s.get(model.id, 0.0), service_s=1.0,
            reason="" if fits else "it is larger than the device",
        )  # fmt: skip


def ask(model: str = "auto", text: str = "Hello", tier: str = "") -> TextRequest:
    scheduling = SchedulingOptions(caller=Caller("k", tier))
    body = {"messages": [{"role": "user", "content": text}]}
    return TextRequest(model, TextOperation.CHAT, body, "r", scheduling)


def test_the_cheapest_in_price_and_time_is_first() -> None:
    # Ten seconds of a load are worth ten cents: more than the cloud's five.
    world = World(price={"cloud": 0.05}, eta_s={"small": 10.0, "large": 20.0})
    assert world.router().choose(ask()).models == ("cloud", "small", "large")
    world.eta_s["small"] = 3.0
    choice = world.router().choose(ask())
    assert choice.models == ("small", "cloud", "large")
    assert [option.cost for option in choice.options] == pytest.approx([0.04, 0.06, 0.21])
    assert world.router(value_of_time=0).choose(ask()).models == ("small", "large", "cloud")


def test_an_unknown_wait_counts_as_a_long_one() -> None:
    world = World(eta_s={"small": None}, price={"large": 0.1, "cloud": 1})
    choice = world.router().choose(ask())
    assert choice.models == ("large", "small", "cloud")
    assert choice.options[1].seconds == UNKNOWN_WAIT_S + 1


def test_best_and_fast_change_what_decides() -> None:
    world = World(price={"cloud": 0.5}, eta_s={"small": 5.0, "large": 1.0, "cloud": 2.0})
    assert world.router().choose(ask("auto:best")).models == ("cloud", "large", "small")
    assert world.router().choose(ask("auto:fast")).models == ("large", "cloud", "small")
    assert world.router(prefer="best").choose(ask("auto:cheap")).models[0] == "large"
    assert world.router(prefer="best").choose(ask()).models[0] == "cloud"
    assert "auto:nothing" not in world.router()


def test_a_hard_request_needs_a_better_model() -> None:
    router = World().router(least_quality=0.2, hard_quality=0.9)
    assert router.choose(ask(text="Hello")).models[0] == "small"
    hard = "Prove the theorem by an integral. Compare, analyse and plan step by step. " * 200
    choice = router.choose(ask(text=hard))
    assert choice.models == ("cloud",)
    assert 0.6 < choice.needed_quality < 0.9
    told = {option.model: option.reason for option in choice.options}
    assert told["small"] == f"its quality is below {choice.needed_quality:.2f}"


def test_who_cannot_do_it_is_left_out_with_the_reason() -> None:
    world = World(
        price={"cloud": 0.5}, too_large={"large"}, refuses={"small": "It takes no tools."}
    )
    choice = world.router().choose(ask())
    assert choice.models == ("cloud",)
    told = {option.model: option.reason for option in choice.options}
    assert told["small"] == "It takes no tools."
    assert told["large"] == "it is larger than the device"
    none = world.router(most_price=0.4).choose(ask())
    assert none.models == ()
    error = none.refusal()
    assert error.param == "tools"
    for word in ("It takes no tools", "larger than the device", "above the ceiling of $0.400000"):
        assert word in error.message


def test_a_route_may_be_for_some_tiers_only() -> None:
    router = World().router(tiers=["paid", "staff"])
    assert router.choose(ask(tier="staff")).models
    with pytest.raises(InvalidRequest, match="paid or staff") as raised:
        router.choose(ask(tier="free"))
    assert (raised.value.status, raised.value.param) == (403, "model")


@pytest.mark.parametrize(
    ("quality", "first"),
    [(Quality.LOW, "small"), (Quality.MEDIUM, "large"), (Quality.HIGH, "cloud")],
)
def test_a_profile_decides_for_images(quality: Quality, first: str) -> None:
    world = World(eta_s={"small": 9.0, "large": 9.0, "cloud": 9.0})
    router = world.router(
        least_quality=0.5, profiles={"speed": "small", "balanced": "large", "quality": "cloud"}
    )
    request = ImageRequest(
        model="auto", operation=ImageOperation.GENERATION, request_id="r", quality=quality
    )
    assert router.choose(request).models[0] == first
    # Without a profile the floor holds.
    assert "small" not in router.choose(replace(request, quality=Quality.AUTO)).models


def test_a_model_is_looked_at_once_under_all_its_names() -> None:
    router = World().router(choose=["big", "large"])
    assert router.choose(ask()).models == ("large",)


@pytest.mark.parametrize(
    ("route", "told"),
    [
        ({"id": "small"}, "routes: the name 'small' is taken by 'small'"),
        ({"id": "taken"}, "routes: the name 'taken:best' is taken by 'large'"),
        ({"choose": ["nobody"]}, "routes: choose of 'auto': no model has the name 'nobody'"),
        ({"choose": []}, "routes[0].choose"),
        ({"prefer": "luck"}, "routes[0].prefer"),
        ({"least_qualty": 1}, "routes[0].least_qualty: unknown key (did you mean least_quality?)"),
        ({"profiles": {"speed": "nobody"}}, "routes: profiles of 'auto': no model has the name"),
    ],
)
def test_a_wrong_route_is_told_by_its_key(route: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        World().router(**route)
    assert told in raised.value.message
