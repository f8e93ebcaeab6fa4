"""How a request is scheduled: fields of this server's own, in any body or as headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, PlainValidator

from engine.requests import Priority, SchedulingOptions
from engine.units import parse_duration
from server.forms import Fields
from server.headers import HEADER_PREFIX
from server.schemas.fields import Body


def _read_priority(value: Any) -> Priority:
    try:
        return Priority[value.strip().upper()]
    except (AttributeError, KeyError):
        names = ", ".join(priority.name.lower() for priority in Priority)
        raise ValueError(f"it is one of {names}") from None


PriorityField: TypeAlias = Annotated[Priority | None, PlainValidator(_read_priority)]


def _read_timeout_s(value: Any) -> float:
    timeout_s = parse_duration(value)
    if not 0 < timeout_s < math.inf:
        raise ValueError("it is a time above 0, in seconds or as in 90s or 5m")
    return timeout_s


def _read_keep_alive_s(value: Any) -> float:
    # Ollama's: whatever is below zero is for ever, with a unit as well.
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
    """The fields of `SchedulingOptions` as a body has them; null stands for the default."""

    priority: PriorityField = None
    timeout: Annotated[float | None, PlainValidator(_read_timeout_s)] = None
    """Seconds, or a duration such as `90s` or `5m`."""
    keep_alive: Annotated[float | None, PlainValidator(_read_keep_alive_s)] = None
    """As Ollama's: seconds or a duration; below 0 for ever, 0 leaves at once."""
    if_loaded_only: bool = False
    no_evict: bool = False


class SchedulingHeaders(SchedulingBody):
    """The same as headers, as in `x-roundhouse-keep-alive`."""

    model_config = ConfigDict(alias_generator=_header)


_FIELDS = tuple(SchedulingBody.model_fields)
_HEADERS = tuple(_header(name) for name in _FIELDS)


def take_scheduling_options(
    headers: Mapping[str, str], fields: Fields, default: Priority = Priority.NORMAL
) -> SchedulingOptions:
    """The scheduling options that a request names; what its body says goes before its headers.

    Takes them out of `fields`, which go on to schemas that do not know them.

    Raises:
        InvalidRequest: naming the field or header at fault.

    """
    named: dict[str, Any] = {}
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
    )


def _named(scheduling: SchedulingBody) -> dict[str, Any]:
    return {name: getattr(scheduling, name) for name in scheduling.model_fields_set}
