"""Imports of libraries without the packages that are not used here, or not yet.

Nothing here imports a library before it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any


@contextmanager
def sparing_transformers() -> Iterator[None]:
    """Import libraries inside this context, without two packages that transformers can do without.

    They are scikit-learn, for assisted generation, and SciPy, for training object detectors.
    """
    from transformers import utils

    with replaced(utils, is_sklearn_available=_no, is_scipy_available=_no):
        import_module("transformers.generation.candidate_generator")
        import_module("transformers.loss.loss_utils")
    yield


@contextmanager
def late_module(name: str) -> Iterator[None]:
    """Inside this context an import of `name` gives a stand-in, unless it is imported already.

    The stand-in imports the module when an attribute of it is first read.
    """
    late = _Late(name)
    given = sys.modules.setdefault(name, late)
    try:
        yield
    finally:
        if given is late:
            late.make_room()


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes inside this context."""
    kept = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


class _Late(ModuleType):
    def make_room(self) -> None:
        """Let the next import find the module itself."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # the import system looks at these
            raise AttributeError(name)
        self.make_room()
        return getattr(import_module(self.__name__), name)


def _no() -> bool:
    return False
