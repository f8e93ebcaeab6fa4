"""The query of `/v1/engine/usage`."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator, StringConstraints, WithJsonSchema

from engine.costs.usage_store import GROUPS
from server.schemas.fields import Body


def _read_groups(value: Any) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else []
    if not names or not set(names) <= set(GROUPS) or len(set(names)) < len(names):
        raise ValueError(f"one of {', '.join(GROUPS)}, or several with commas between them")
    return tuple(names)


def _check_day(value: str) -> str:
    date.fromisoformat(value)
    return value


Day = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_check_day)]


class UsageQuery(Body):
    """`GET /v1/engine/usage`: how to group, and what to leave out."""

    by: Annotated[
        tuple[str, ...],
        PlainValidator(_read_groups),
        WithJsonSchema({"type": "string", "examples": [*GROUPS, "day,model"]}),
    ] = ("model",)
    """`key`, `model`, `provider`, `day`, `month`, or several with commas between them."""
    since: Day | None = None
    """The first day, as `2026-03-01` (UTC)."""
    until: Day | None = None
    """The last day."""
    key: str | None = None
    """The name of a key. Without an admin key it can only be that of the request."""
