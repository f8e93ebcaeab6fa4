"""What a value must be, in plain words: the rule that a wrong value breaks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic_core import ErrorDetails

_RULES: Mapping[str, str] = MappingProxyType(
    {
        "bool_parsing": "it must be true or false",
        "bool_type": "it must be true or false",
        "bytes_type": "it must be a file or a string",
        "dict_type": "it must be an object",
        "finite_number": "it must be a finite number",
        "float_parsing": "it must be a number",
        "float_type": "it must be a number",
        "greater_than": "it must be above {gt:g}",
        "greater_than_equal": "it must be at least {ge:g}",
        "int_from_float": "it must be a whole number",
        "int_parsing": "it must be a whole number",
        "int_parsing_size": "it must be a smaller number",
        "int_type": "it must be a whole number",
        "less_than": "it must be below {lt:g}",
        "less_than_equal": "it must be at most {le:g}",
        "list_type": "it must be a list",
        "literal_error": "it must be {expected}",
        "model_attributes_type": "it must be an object",
        "model_type": "it must be an object",
        "path_type": "it must be a path",
        "string_sub_type": "it must be a string",
        "string_too_long": "it must have at most {max_length} characters",
        "string_too_short": "it must not be empty",
        "string_type": "it must be a string",
        "too_long": "it must have at most {max_length} items",
        "too_short": "it must have at least {min_length} item",
        "tuple_type": "it must be a list",
    }
)
"""By pydantic's type of the error. Its own messages name classes, and speak of input."""


def rule(error: ErrorDetails) -> str:
    """The rule that a value breaks, as the end of a sentence."""
    context = error.get("ctx") or {}
    if error["type"] in ("string_too_short", "too_short") and context["min_length"] > 1:
        kind = "characters" if error["type"] == "string_too_short" else "items"
        return f"it must have at least {context['min_length']} {kind}"
    if (words := _RULES.get(error["type"])) is not None:
        return words.format(**context)
    return error["msg"].removeprefix("Value error, ").removesuffix(".")
