"""JSON Schemas of pydantic models, with the docstrings of fields as descriptions."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from engine.units import MemoryBudget, parse_duration, parse_size

SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"
_UNIT = r"([mM]?[sS]|[mMhHdD])"
DURATION_PATTERN = (
    rf"^\s*(\d+(\.\d+)?\s*{_UNIT}?|(\d+(\.\d+)?{_UNIT}\s*)+|[fF][oO][rR][eE][vV][eE][rR])\s*$"
)
SHARE_PATTERN = r"^\s*\d+(\.\d+)?\s*%\s*$"

_CONSTRAINTS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def size_schema(number: Mapping[str, Any]) -> JsonSchemaValue:
    """A size: bytes, or text such as `512MiB`. `number` has the bounds of the bytes."""
    bounds = {"minimum": 0, **_bounds(number)}
    text = {"type": "string", "pattern": SIZE_PATTERN, "examples": ["512MiB", "8GB"]}
    return {"anyOf": [{"type": "integer", **bounds}, text]}


def duration_schema(number: Mapping[str, Any]) -> JsonSchemaValue:
    """A duration: seconds, or text such as `90s`. `number` has the bounds of the seconds."""
    bounds = {"minimum": 0, **_bounds(number)}
    text = {"type": "string", "pattern": DURATION_PATTERN, "examples": ["90s", "1h30m", "forever"]}
    return {"anyOf": [{"type": "number", **bounds}, text]}


def budget_schema(_: Mapping[str, Any]) -> JsonSchemaValue:
    """A size above 0, or a share such as `80%`."""
    size = size_schema({"exclusiveMinimum": 0})
    share = {"type": "string", "pattern": SHARE_PATTERN, "examples": ["80%"]}
    return {"anyOf": [*size["anyOf"], share]}


class SchemaGenerator(GenerateJsonSchema):
    """Knows how sizes and durations are written, and adds descriptions from docstrings."""

    parsers: Mapping[Any, Callable[[Mapping[str, Any]], JsonSchemaValue]] = {
        parse_size: size_schema,
        parse_duration: duration_schema,
        MemoryBudget.parse: budget_schema,
    }
    """By the function that reads a value: what it takes, from the schema of the result."""

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """The schema of the text that the function reads, if it is known."""
        return self._parsed(schema) or super().function_before_schema(schema)

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """The same for a function that replaces the validation."""
        return self._parsed(schema) or super().function_plain_schema(schema)

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """The schema of a model, with descriptions of its fields."""
        return _described(super().model_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """The same of a dataclass."""
        return _described(super().dataclass_schema(schema), schema["cls"])

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """No titles: they would only repeat the names of the fields."""
        return False

    def _parsed(self, schema: Any) -> JsonSchemaValue | None:
        parser = self.parsers.get(schema["function"]["function"])
        if parser is None:
            return None
        inner = schema.get("schema")
        return parser({} if inner is None else self.generate_inner(inner))


def field_docstrings(kind: type[Any]) -> Mapping[str, str]:
    """The docstrings below the fields of a class, and of the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base not in (object, BaseModel):
            found |= _own_docstrings(base)
    return found


def _described(document: JsonSchemaValue, kind: type[Any]) -> JsonSchemaValue:
    properties = document.get("properties", {})
    fields = kind.model_fields if issubclass(kind, BaseModel) else {}
    for name, text in field_docstrings(kind).items():
        written = (fields[name].alias or name) if name in fields else name
        if written in properties:
            properties[written].setdefault("description", text)
    return document


@cache  # many bodies inherit from the same classes, and reading their source takes long
def _own_docstrings(kind: type[Any]) -> Mapping[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found


def _bounds(number: Mapping[str, Any]) -> dict[str, Any]:
    return {name: number[name] for name in _CONSTRAINTS if name in number}
