"""Filters of attributes."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from server.vector_stores.filters import MAX_DEPTH, MAX_PARTS, Attributes, parse_filter

FILES: dict[str, Attributes] = {
    "a": {"year": 1, "name": "one", "good": True},
    "b": {"year": 2.5, "name": "two", "good": False},
    "c": {"name": "1", "good": 1},
    "d": {},
}


def compared(kind: str, key: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "key": key, "value": value}


def passing(document: Any) -> str:
    wanted = parse_filter(document)
    return "".join(name for name, attributes in FILES.items() if wanted(attributes))


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (compared("eq", "year", 1), "a"),
        (compared("eq", "year", 1.0), "a"),
        (compared("eq", "year", "1"), ""),
        (compared("eq", "good", True), "a"),
        (compared("eq", "good", 1), "c"),
        (compared("ne", "good", True), "bcd"),
        (compared("gt", "year", 1), "b"),
        (compared("gte", "year", 1), "ab"),
        (compared("lt", "year", 2.5), "a"),
        (compared("lte", "year", 2.5), "ab"),
        (compared("gt", "name", "one"), "b"),
        (compared("gt", "name", 1), ""),
        (compared("lt", "good", 5), "c"),
        (compared("in", "name", ["one", "1"]), "ac"),
        (compared("in", "good", [True]), "a"),
        (compared("in", "good", []), ""),
        (compared("nin", "name", ["one", "1"]), "bd"),
        (
            {
                "type": "or",
                "filters": [
                    compared("eq", "name", "1"),
                    {
                        "type": "and",
                        "filters": [compared("gte", "year", 1), compared("eq", "good", False)],
                    },
                ],
            },
            "bc",
        ),
    ],
)
def test_what_passes(document: Any, names: str) -> None:
    assert passing(document) == names


def test_what_is_wrong_is_named() -> None:
    deep: Any = compared("eq", "a", 1)
    for _ in range(MAX_DEPTH):
        deep = {"type": "and", "filters": [deep]}
    many = {"type": "or", "filters": [compared("eq", "a", 1)] * MAX_PARTS}
    for document, param in (
        ([], "filters"),
        ({"type": "and"}, "filters.filters"),
        ({"type": "and", "filters": []}, "filters.filters"),
        ({"type": "and", "filters": [3]}, "filters.filters[0]"),
        ({"type": "eq", "key": 1, "value": 1}, "filters.key"),
        (compared("in", "a", "b"), "filters.value"),
        (compared("eq", "a", [1]), "filters.value"),
        ({**compared("eq", "a", 1), "more": 1}, "filters"),
        (deep, f"filters{'.filters[0]' * MAX_DEPTH}"),
        (many, f"filters.filters[{MAX_PARTS - 1}]"),
    ):
        with pytest.raises(InvalidRequest) as error:
            parse_filter(document)
        assert error.value.param == param
