"""Whose request it is."""

from __future__ import annotations

from dataclasses import dataclass

from engine.usage import Usage


@dataclass(frozen=True, slots=True)
class Caller:
    """The key of a request, by name: never the key itself."""

    name: str = ""
    """Empty without keys."""
    tier: str = ""
    """What routes may ask for."""

    def count(self, usage: Usage) -> None:
        """Note what a request of this caller took, once it has ended.

        Here it is noted nowhere. A server that limits the tokens of its callers has its own kind.
        """


NOBODY = Caller()
