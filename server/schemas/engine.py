"""The bodies of `/v1/engine/plan` and `/v1/engine/route`, the query of `/v1/engine/events`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from engine.units import parse_size
from server.schemas.fields import Body, ModelName
from server.schemas.scheduling_options import PriorityField

MAX_EVENTS = 1000


class PlanBody(Body):
    """`POST /v1/engine/plan`: the request to plan for."""

    model: ModelName
    further_models: list[ModelName] = Field(default_factory=list)
    """The models that a session keeps beside `model`, all at once."""
    priority: PriorityField = None
    working_bytes: Annotated[int, PlainValidator(parse_size)] = 0
    """The memory of its run besides the model: bytes, or a size such as `2GiB`."""


class RouteBody(Body):
    """`POST /v1/engine/route`: the request to choose a model for."""

    endpoint: str = "/v1/chat/completions"
    """The path that the request would be sent to."""
    body: dict[str, Any]
    """Its body; `model` is the name of a route or a model."""


class EventsQuery(Body):
    """The query of `GET /v1/engine/events`."""

    stream: bool = False
    after: int | None = Field(default=None, ge=0, lt=10**18)
    """The id of the event before the first one. 0 is before all."""
    limit: int = Field(default=100, ge=1, le=MAX_EVENTS)
    """The number of events in a document."""
