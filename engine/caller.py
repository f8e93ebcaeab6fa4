"""Whose request it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The key of a request, by name: never the key itself."""

    name: str = ""
    """Empty without keys."""
    tier: str = ""
    """What routes may ask for."""


NOBODY = Caller()
