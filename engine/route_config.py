"""The configuration of routes: names that stand for the cheapest model that can do a request."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from engine.section import Section

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\s]+$")]


class Preference(StrEnum):
    """What decides among the models that can do a request."""

    CHEAP = "cheap"
    """Price and time together."""
    BEST = "best"
    """`quality`; among equals the cheapest."""
    FAST = "fast"
    """The forecast seconds; among equals the cheapest."""


class Profile(StrEnum):
    """What the `quality` of an image or a video asks for: low, medium or high."""

    SPEED = "speed"
    BALANCED = "balanced"
    QUALITY = "quality"


class ExamplesConfig(Section):
    """Requests whose difficulty is known, for an embedding model to compare others with."""

    model: ModelId
    """A model that embeds."""
    simple: tuple[str, ...] = Field(min_length=1)
    hard: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(default=0.8, ge=0, le=1)


class ComplexityConfig(Section):
    """The weights, 0 to 1, of the score that tells a simple request from a hard one.

    Each part of a request is 0 to 1. The score is 1 - Π (1 - weight × part).
    """

    length: float = Field(default=0.7, ge=0, le=1)
    """How long the prompt is: 1 at `long` characters."""
    long: int = Field(default=8000, gt=0)
    code: float = Field(default=0.6, ge=0, le=1)
    """Whether it holds code, or asks for it."""
    mathematics: float = Field(default=0.6, ge=0, le=1)
    """Whether it holds formulas, or asks for a proof or a calculation."""
    reasoning: float = Field(default=0.8, ge=0, le=1)
    """Whether it asks for steps, plans or comparisons, or for a reasoning effort."""
    examples: ExamplesConfig | None = None
    """Whether it is closer to hard examples than to simple ones. None: nobody looks."""


class RouteConfig(Section):
    """A virtual model. Of those that can do a request it takes the cheapest.

    The cost of a model is its price and the forecast seconds times `value_of_time`. With
    `NAME:best` a request takes the best that can do it, and with `NAME:fast` the soonest.
    """

    id: ModelId
    choose: tuple[ModelId, ...] = Field(min_length=1)
    """The models to choose from, by id or alias."""
    prefer: Preference = Preference.CHEAP
    """What decides among the models that can do a request."""
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
    profiles: Mapping[Profile, ModelId] = Field(default_factory=dict)
    """For images and video: the model for a `quality` of low, medium and high."""

    @property
    def names(self) -> tuple[str, ...]:
        """The id, and the id with each preference."""
        return (self.id, *(f"{self.id}:{prefer.value}" for prefer in Preference))
