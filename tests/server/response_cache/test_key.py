"""Which requests are equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from engine.caller import NOBODY, Caller
from server.forms import Fields
from server.response_cache.key import LARGE, owner_of, request_key

LONG = "x" * (LARGE + 1)

# Small, as two bodies must often be equal or alike.
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just(LONG)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
bodies = st.dictionaries(st.text(max_size=2), values, max_size=3)


def key(values: Any, *parts: object, typed: bool = True) -> bytes:
    return request_key(Fields(values, typed=typed), *parts)


def turned(value: Any) -> Any:
    """The same JSON with the keys of each object in the other order."""
    if isinstance(value, dict):
        return {name: turned(value[name]) for name in reversed(list(value))}
    return [turned(item) for item in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: in Python true is 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@given(bodies)
def test_the_order_of_keys_means_nothing(body: dict[str, Any]) -> None:
    before = copy.deepcopy(body)
    assert key(body) == key(turned(body))
    assert body == before


@given(bodies, bodies)
def test_other_values_make_another_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (key(one) == key(other)) is same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": LONG}, {"a": None}),
        ({"a": LONG}, {"b": LONG}),
        ({"a": [LONG, None]}, {"a": [None, LONG]}),
        ({"a": LONG}, {"a": LONG + "x"}),
        ({"a": LONG}, {"a": LONG[:-1] + "y"}),
        ({"a": b"x"}, {"a": "x"}),
        ({"a": b"x"}, {"a": b"y"}),
        ({"a": [b"x", b"y"]}, {"a": [b"y", b"x"]}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": [1]}, {"a": [True]}),
        ({"a": 1}, {"a": "1"}),
    ],
)
def test_what_is_alike_is_not_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(one) != key(other)
    assert key(one) == key(copy.deepcopy(one))


def test_everything_beside_the_body_counts() -> None:
    parts = [(), ("a",), ("b",), ("a", "b"), (["a", "b"],), (None,)]
    assert len({key({}, *each) for each in parts}) == len(parts)
    assert key({}, typed=False) != key({})


def test_a_form_may_hold_what_is_no_text() -> None:
    assert key({"a": "\udc80"}) != key({"a": "\udc81"})


def test_whose_it_is() -> None:
    def owner(name: str, has_keys: bool = True, **headers: str) -> tuple[str, ...]:
        caller = Caller(name) if name else NOBODY
        return owner_of(caller, Headers(headers), has_keys=has_keys)

    # A key that was replaced is still that of the same person.
    assert owner("anna", authorization="Bearer 1") == owner("anna", authorization="Bearer 2")
    assert owner("anna", authorization="Bearer 1") != owner("bert", authorization="Bearer 1")
    assert owner("", authorization="Bearer 1") != owner("", authorization="Bearer 2")
    assert owner("", authorization="Bearer 1") not in (owner("anna"), owner("Bearer 1"))
    assert "1" not in owner("", authorization="1")
    assert owner("", has_keys=False, authorization="Bearer 1") == owner("", has_keys=False)
