"""OpenAI's filters of attributes: comparisons, and what joins them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from engine.errors import InvalidRequest
from engine.words import echoed

Attributes: TypeAlias = Mapping[str, str | float | bool]
Filter: TypeAlias = Callable[[Attributes], bool]
"""Whether a file with these attributes may be found."""

MAX_DEPTH = 16
MAX_PARTS = 256
MAX_VALUES = 1000

_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_COMPARISONS = ("eq", "ne", *_ORDERS, "in", "nin")
_COMPOUNDS = ("and", "or")


def parse_filter(document: Any, param: str = "filters") -> Filter:
    """The filter that a request describes. `param` is the field with it.

    A file without the attribute passes `ne` and `nin`, and nothing else. A number is never equal to
    a text or to true.

    Raises:
        InvalidRequest: naming the part at fault.

    """
    return _Parser().parse(document, param, 1)


class _Parser:
    def __init__(self) -> None:
        self._parts = 0

    def parse(self, document: Any, where: str, depth: int) -> Filter:
        self._parts += 1
        if depth > MAX_DEPTH or self._parts > MAX_PARTS:
            raise _wrong(where, f"it has at most {MAX_PARTS} parts, {MAX_DEPTH} deep")
        if not isinstance(document, dict):
            raise _wrong(where, "it is an object with 'type'")
        kind = document.get("type")
        if kind in _COMPOUNDS:
            return self._compound(document, where, depth)
        if kind in _COMPARISONS:
            return _comparison(document, where)
        known = ", ".join((*_COMPARISONS, *_COMPOUNDS))
        raise _wrong(f"{where}.type", f"it is one of {known}")

    def _compound(self, document: dict[str, Any], where: str, depth: int) -> Filter:
        _check_keys(document, where, ("type", "filters"))
        given = document["filters"]
        if not isinstance(given, list) or not given:
            raise _wrong(f"{where}.filters", "it is a list of filters")
        parts = [
            self.parse(each, f"{where}.filters[{index}]", depth + 1)
            for index, each in enumerate(given)
        ]
        joined = all if document["type"] == "and" else any
        return lambda attributes: joined(part(attributes) for part in parts)


def _comparison(document: dict[str, Any], where: str) -> Filter:
    _check_keys(document, where, ("type", "key", "value"))
    kind, key, value = document["type"], document["key"], document["value"]
    if not isinstance(key, str):
        raise _wrong(f"{where}.key", "it is the name of an attribute")
    if kind in ("in", "nin"):
        if not isinstance(value, list) or not all(map(_is_value, value)):
            raise _wrong(f"{where}.value", "it is a list of texts, numbers or booleans")
        if len(value) > MAX_VALUES:
            raise _wrong(f"{where}.value", f"it has at most {MAX_VALUES} values")
        among = {_typed(each) for each in value}
        wanted = kind == "in"
        return lambda attributes: (key in attributes and _typed(attributes[key]) in among) == wanted
    if not _is_value(value):
        raise _wrong(f"{where}.value", "it is a text, a number or a boolean")
    if kind in ("eq", "ne"):
        own, wanted = _typed(value), kind == "eq"
        return lambda attributes: (key in attributes and _typed(attributes[key]) == own) == wanted
    if isinstance(value, bool):
        raise _wrong(f"{where}.value", f"true and false have no order, as {kind} needs")
    compare = _ORDERS[kind]
    text = isinstance(value, str)

    def compares(attributes: Attributes) -> bool:
        found = attributes.get(key)
        if found is None or isinstance(found, bool) or isinstance(found, str) != text:
            return False
        return compare(found, value)

    return compares


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _typed(value: Any) -> tuple[str, Any]:
    """The value with its kind: in Python 1 is equal to True."""
    if isinstance(value, bool):
        return "boolean", value
    return ("text", value) if isinstance(value, str) else ("number", value)


def _check_keys(document: dict[str, Any], where: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in document:
            raise _wrong(f"{where}.{key}", "it is missing")
    unknown = next((key for key in document if key not in keys), None)
    if unknown is not None:
        raise _wrong(where, f"it has no {echoed(unknown)}")


def _wrong(where: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: {rule}.", param=where)
