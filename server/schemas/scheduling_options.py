"""The scheduling options of a request: fields of our own, in any body or as headers."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from fastapi import Request
from pydantic import ConfigDict, PlainValidator, WithJsonSchema

from engine.requests import Priority, SchedulingOptions
from engine.units import parse_duration
from server.forms import Fields
from server.headers import HEADER_PREFIX
from server.keys.access import access_of
from server.schemas.fields import Body


def _read_priority(value: Any) -> Priority:
    try:
        return Priority[value.strip().upper()]
    except (AttributeError, KeyError):
        names = ", ".join(priority.name.lower() for priority in Priority)
        raise ValueError(f"it is one of {names}") from None


PriorityField: TypeAlias = Annotated[
    Priority | None,
    PlainValidator(_read_priority),
    WithJsonSchema({"enum": [priority.name.lower() for priority in Priority]}),
]


def _read_timeout_s(value: Any) -> float:
    timeout_s = parse_duration(value)
    if not 0 < timeout_s < math.inf:
        raise ValueError("it is a time above 0, in seconds or as in 90s or 5m")
    return timeout_s


def _read_keep_alive_s(value: Any) -> float:
    # As in Ollama: a value below zero is for ever, with a unit as well.
    if isinstance(value, str) and value.lstrip().startswith("-"):
        value = value.strip()
        parse_duration(value[1:])
        return math.inf
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        return math.inf
    return parse_duration(value)


def _header(name: str) -> str:
    return HEADER_PREFIX + name.replace("_", "-")


class SchedulingBody(Body):
    """The fields of `SchedulingOptions` in a body; null means the default."""

    priority: PriorityField = None
    """By default speech and transcription are interactive, videos batch, and all others normal."""
    timeout: Annotated[
        float | None,
        PlainValidator(_read_timeout_s),
        WithJsonSchema({"type": ["number", "string"], "examples": ["90s"]}),
    ] = None
    """How long to wait for the model: seconds, or a duration such as `90s` or `5m`."""
    keep_alive: Annotated[
        float | None,
        PlainValidator(_read_keep_alive_s),
        WithJsonSchema({"type": ["number", "string"], "examples": ["10m"]}),
    ] = None
    """How long the idle model stays, as in Ollama: seconds or a duration.

    Below 0 it stays for ever, at 0 it leaves at once.
    """
    if_loaded_only: bool = False
    """Answer 409 at once if the model would have to be loaded or woken."""
    no_evict: bool = False
    """Evict no other model for this request."""
    max_wait: Annotated[
        float | None,
        PlainValidator(_read_timeout_s),
        WithJsonSchema({"type": ["number", "string"], "examples": ["5s"]}),
    ] = None
    """How long to wait for the model before its fallbacks are tried, if it has any."""


class SchedulingHeaders(SchedulingBody):
    """The same fields as headers, for example `x-roundhouse-keep-alive`."""

    model_config = ConfigDict(alias_generator=_header)


_FIELDS = tuple(SchedulingBody.model_fields)
_HEADERS = tuple(_header(name) for name in _FIELDS)


def take_scheduling_options(
    request: Request, fields: Fields, default: Priority = Priority.NORMAL
) -> SchedulingOptions:
    """The scheduling options of a request, and its caller. Its body goes before its headers.

    Takes them out of `fields`, as the schemas of the endpoints do not know them. Every request that
    runs a model comes by here, so this is where the caller's key must allow the model.

    Raises:
        InvalidRequest: naming the wrong field or header.
        ModelForbidden: the key may not use the model that `fields` names.

    """
    access = access_of(request)
    model = fields.values.get("model")
    if isinstance(model, str):  # otherwise the schema refuses it
        access.check_model(model)
    named: dict[str, Any] = {}
    headers = request.headers
    in_headers = {name: headers[name] for name in _HEADERS if name in headers}
    if in_headers:
        named |= _named(SchedulingHeaders.of(Fields(in_headers, typed=False)))
    in_body = {name: fields.values.pop(name) for name in _FIELDS if name in fields.values}
    if in_body:
        named |= _named(SchedulingBody.of(Fields(in_body, typed=fields.typed)))
    return SchedulingOptions(
        priority=named.get("priority", default),
        timeout_s=named.get("timeout"),
        keep_alive_s=named.get("keep_alive"),
        if_loaded_only=named.get("if_loaded_only", False),
        no_evict=named.get("no_evict", False),
        max_wait_s=named.get("max_wait"),
        caller=access.caller,
    )


def _named(scheduling: SchedulingBody) -> dict[str, Any]:
    return {name: getattr(scheduling, name) for name in scheduling.model_fields_set}
