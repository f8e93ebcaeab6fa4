"""The process-wide variables that exclusive work may change, to save and restore."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


class SharedState:
    """The process-wide variables that exclusive work may change."""

    def __init__(self) -> None:
        self._variables: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "random": (random.getstate, random.setstate),
        }

    def register(self, name: str, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        """Add a variable that `save` and `restore` cover."""
        self._variables[name] = (get, put)

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def save(self) -> dict[str, Any]:
        """The present value of every variable."""
        return {name: get() for name, (get, _) in self._variables.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what `save` returned. Variables registered since then are left alone."""
        for name, value in saved.items():
            self._variables[name][1](value)
