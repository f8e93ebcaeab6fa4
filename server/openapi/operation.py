"""What the OpenAPI document says about one route and method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.schemas.fields import Body

Schema = Mapping[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
LINES = "application/x-ndjson"

BINARY: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
"""The bytes of a file."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One route with one method."""

    summary: str
    answers: Mapping[str, Schema]
    """The body of a success, by media type."""
    description: str = ""
    json: type[Body] | Schema | None = None
    """The body as JSON."""
    form: type[Body] | Schema | None = None
    """The body as `multipart/form-data`."""
    query: type[Body] | None = None
    scheduled: bool = False
    """Whether it takes the scheduling options, in its body and as headers."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers that it reads, with what they mean."""
    others: Mapping[int, str] = field(default_factory=dict)
    """Other statuses that are not errors in the envelope, with what they mean."""
    link: str | None = None
    """The library's or provider's own description of the body."""
    example: Mapping[str, Any] | None = None
    """A body to try. `MODEL` becomes the id of a configured model of `task`."""
    task: str | None = None


def reference(name: str) -> Schema:
    """A reference to a schema of the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(*, optional: Mapping[str, Schema] | None = None, **properties: Schema) -> Schema:
    """An object with these properties, all of which are always there but for `optional`."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": [*properties],
    }


def listing(item: Schema, **properties: Schema) -> Schema:
    """OpenAI's list object."""
    return record(object={"const": "list"}, data={"type": "array", "items": item}, **properties)


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    null = {"type": "null"}
    if schema.keys() != {"anyOf"}:
        return {"anyOf": [schema, null]}
    return schema if null in schema["anyOf"] else {"anyOf": [*schema["anyOf"], null]}
