"""Whose answer an answer is."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from server.response_cache.entry import Entry
from server.response_cache.target import Target

SERVED_BY = "x-roundhouse-served-by"
CONFIG = EngineConfig.model_validate(
    {
        "models": [
            {"id": "small", "aliases": ["tiny"], "source": "a/b"},
            {"id": "large", "source": "a/c", "fallbacks": ["cloud"]},
            {"id": "cloud", "source": "a/d"},
            {"id": "auto:7b", "source": "a/e"},
        ],
        "routes": [{"id": "auto", "choose": ["tiny", "large"]}],
    }
)


def entry(served_by: str | None) -> Entry:
    return Entry(200, {} if served_by is None else {SERVED_BY: served_by}, (b"",), streamed=False)


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("tiny", ["small"]),
        ("large", ["large"]),
        ("auto", ["small", "large"]),
        ("auto:best", ["small", "large"]),
        ("auto:7b", ["auto:7b"]),
        ("other", None),
        ("other:best", None),
    ],
)
def test_the_models_of_a_name(name: str, models: list[str] | None) -> None:
    target = Target.of(CONFIG, name)
    assert (target and [model.id for model in target.models]) == models


@pytest.mark.parametrize(
    ("name", "served_by", "answered"),
    [
        ("small", None, True),
        ("small", "small", True),
        ("small", "cloud", False),
        ("large", None, False),  # nobody knows whether its fallback answered
        ("large", "large", True),
        ("large", "cloud", False),
        ("auto", None, False),
        ("auto", "small", True),
        ("auto", "cloud", False),
    ],
)
def test_a_fallback_is_another_model(name: str, served_by: str | None, answered: bool) -> None:
    target = Target.of(CONFIG, name)
    assert target is not None
    assert target.answered(entry(served_by)) is answered
