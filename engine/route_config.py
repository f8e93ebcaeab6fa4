"""The configuration of routes: names that stand for the cheapest model that can do a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints

from engine.section import Section

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\s]+$")]


class ComplexityConfig(Section):
    """The weights of the score that tells a simple request from a hard one.

    Each part is 0 to 1, and so is their weighted mean.
    """

    length: float = Field(default=1.0, ge=0)
    """How long the prompt is: 1 at `long` characters."""
    long: int = Field(default=8000, gt=0)
    code: float = Field(default=1.0, ge=0)
    """Whether it holds code, or asks for it."""
    mathematics: float = Field(default=1.0, ge=0)
    """Whether it holds formulas, or asks for a proof or a calculation."""
    reasoning: float = Field(default=1.0, ge=0)
    """Whether it asks for steps, plans or comparisons, or the request for a reasoning effort."""


class RouteConfig(Section):
    """A virtual model. Of those that can do a request it takes the cheapest.

    The cost of a model is its price and the forecast seconds times `value_of_time`.
    """

    id: ModelId
    choose: tuple[ModelId, ...] = Field(min_length=1)
    """The models to choose from, by id or alias."""
    least_quality: float = Field(default=0.0, ge=0, le=1)
    """The least `quality` of a model for the simplest request."""
    hard_quality: float | None = Field(default=None, ge=0, le=1)
    """The least `quality` for the hardest; in between it grows with the score. None: the same."""
    most_price: float | None = Field(default=None, ge=0)
    """Dollars that a request may cost."""
    value_of_time: float | None = Field(default=None, ge=0)
    """Dollars an hour of waiting is worth. None takes `costs.value_of_time`."""
    tiers: tuple[str, ...] = ()
    """Tiers of keys that may use this route; none: all."""
    complexity: ComplexityConfig = ComplexityConfig()
    profiles: Mapping[str, ModelId] = Field(default_factory=dict)
    """For images, video and speech: the model of a profile (`speed`, `balanced`, `quality`)."""
