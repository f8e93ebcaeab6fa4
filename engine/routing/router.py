"""Chooses the model of a route: the cheapest, in money and time, that can do the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError, InvalidRequest
from engine.requests import ImageRequest, Quality, Request, TextRequest, VideoRequest
from engine.route_config import Preference, Profile, RouteConfig
from engine.routing.choice import Choice, Option
from engine.routing.complexity import complexity
from engine.runtimes.base import Prepared
from engine.status import Forecast

UNKNOWN_WAIT_S = 60.0
"""What the load of a model counts that was never loaded here and whose files are not read."""

UNKNOWN_RUN_S = 5.0
"""What the run of a model counts that has served nothing yet."""

_PROFILES: Mapping[Quality, Profile] = MappingProxyType({
    Quality.LOW: Profile.SPEED,
    Quality.MEDIUM: Profile.BALANCED,
    Quality.HIGH: Profile.QUALITY,
})  # fmt: skip


RequestT = TypeVar("RequestT", bound=Request)


class Router:
    """The routes of a configuration. It reads the state of the engine and changes nothing."""

    def __init__(
        self,
        config: EngineConfig,
        prepare: Callable[[ModelConfig, Request], Prepared],
        outlook: Callable[[ModelConfig, Request, int], Forecast],
        price: Callable[[ModelConfig, Request], float],
    ) -> None:
        """`prepare` checks a request, and `outlook` forecasts it with its working memory.

        `price` is what the request is expected to cost at a model, in dollars.
        """
        self._config = config
        self._prepare = prepare
        self._outlook = outlook
        self._price = price
        self._routes = {
            name: (route, prefer)
            for route in config.routes
            for name, prefer in zip(route.names, (route.prefer, *Preference), strict=True)
        }

    def find(self, name: str) -> RouteConfig:
        """The route of that name, with or without a preference.

        Raises:
            KeyError: there is none.

        """
        return self._routes[name][0]

    def models(self, name: str) -> tuple[ModelConfig, ...]:
        """The models of a route, each once."""
        route = self.find(name)
        named = (*route.choose, *route.profiles.values())
        return tuple({model.id: model for model in map(self._config.find, named)}.values())

    def __contains__(self, name: str) -> bool:
        return name in self._routes

    def choose(self, request: Request, likeness: float | None = None) -> Choice:
        """The models for a request that names a route.

        `likeness` is how like the route's hard examples it is, if it has any.

        Raises:
            InvalidRequest: the caller's key may not use the route.

        """
        route, prefer = self._routes[request.model]
        if route.tiers and request.scheduling.caller.tier not in route.tiers:
            raise InvalidRequest(
                f"The route {route.id!r} is for keys of the tier {' or '.join(route.tiers)}.",
                param="model",
                status=403,
            )
        hard = complexity(request, route.complexity, likeness)
        highest = route.least_quality if route.hard_quality is None else route.hard_quality
        needed = route.least_quality + (highest - route.least_quality) * hard.score
        profile = self._profile_model(route, request)
        options = [
            # Somebody who asks for a profile has said what quality is good enough.
            self._option(route, model, request, 0.0 if model is profile else needed)
            for model in self.models(route.id)
        ]
        options.sort(key=lambda option: self._order(option, prefer, profile))
        return Choice(request.model, prefer, hard, needed, tuple(options))

    def look(self, request: Request, models: Sequence[ModelConfig]) -> Choice:
        """The same for models in a fixed order."""
        options = tuple(self._option(None, model, request, 0.0) for model in models)
        return Choice(request.model, None, None, 0.0, options)

    def _profile_model(self, route: RouteConfig, request: Request) -> ModelConfig | None:
        """The model of the profile that the request's quality asks for, if the route has one."""
        if not isinstance(request, ImageRequest | VideoRequest):
            return None
        profile = _PROFILES.get(request.quality)
        name = route.profiles.get(profile) if profile is not None else None
        return None if name is None else self._config.find(name)

    def _order(
        self, option: Option, prefer: Preference, profile: ModelConfig | None
    ) -> tuple[bool, bool, float, float]:
        if option.cost is None or option.seconds is None:
            return (True, True, 0.0, 0.0)
        first = {
            Preference.CHEAP: 0.0,
            Preference.BEST: -option.quality,
            Preference.FAST: option.seconds,
        }[prefer]
        asked = profile is not None and option.model == profile.id
        return (not option.capable, not asked, first, option.cost)

    def _option(
        self, route: RouteConfig | None, model: ModelConfig, request: Request, needed: float
    ) -> Option:
        own = request_to(model, request)
        if model.quality < needed:
            return Option(model.id, f"its quality is below {needed:.2f}", model.quality)
        try:
            prepared = self._prepare(model, own)
        except EngineError as error:
            return Option(model.id, error.message, model.quality, param=error.param)
        forecast = self._outlook(model, own, prepared.working_bytes)
        price = self._price(model, own)
        wait_s = UNKNOWN_WAIT_S if forecast.eta_s is None else forecast.eta_s
        run_s = UNKNOWN_RUN_S if forecast.service_s is None else forecast.service_s
        seconds = wait_s + run_s
        worth = None if route is None else route.value_of_time
        if worth is None:
            worth = self._config.costs.value_of_time
        ceiling = None if route is None else route.most_price
        reason = ""
        if not forecast.fits:
            reason = forecast.reason
        elif ceiling is not None and price > ceiling:
            reason = f"it costs ${price:.6f}, above the ceiling of ${ceiling:.6f}"
        return Option(
            model.id, reason, model.quality, price, seconds, price + seconds / 3600 * worth
        )


def with_adapter(config: EngineConfig, request: RequestT) -> RequestT:
    """The request with the adapter of a name `MODEL:ADAPTER` in a field of its own.

    Raises:
        ModelNotFound: no model has that name.

    """
    model, adapter = config.find_adapter(request.model)
    if adapter is None:
        return request
    if isinstance(request, TextRequest):
        return replace(request, model=model.id, adapter=adapter)
    return replace(request, model=model.id)


def request_to(model: ModelConfig, request: RequestT) -> RequestT:
    """The request, addressed to a model. Only the model that it names has its adapter."""
    if request.model in model.names:
        return request
    if isinstance(request, TextRequest):
        return replace(request, model=model.id, adapter=None)
    return replace(request, model=model.id)
