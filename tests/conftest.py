"""Fixtures that tests of the engine and of the server share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.starter import ensure_starter

StarterDir = Callable[[str], Path]


@pytest.fixture(scope="session")
def starter_dir(tmp_path_factory: pytest.TempPathFactory) -> StarterDir:
    """Gives the folder of a starter model, each built once for all tests."""
    cache_dir = tmp_path_factory.mktemp("starters")
    return lambda name: ensure_starter(name, cache_dir)
