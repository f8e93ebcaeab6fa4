"""What a provider says that it counted, which may be anything."""

from __future__ import annotations

from typing import Any

MOST_TOKENS = 10**9
"""Of one request. A provider that counts more is wrong, and its number is left out."""

MOST_SECONDS = 10**7
"""The same of a recording."""

MOST_DOLLARS = 10**6
"""The same of a price that a provider reports."""


def token_count(value: Any) -> int | None:
    """A number of tokens; None if it is none."""
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if known else None


def dollars(value: Any) -> float | None:
    """A price; None if it is none."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and 0 <= value <= MOST_DOLLARS else None
