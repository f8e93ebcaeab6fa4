"""Fixtures that tests of the engine and of the server share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from engine import engine
from engine.process.faults import FAULTS
from engine.starters.registry import ensure_starter

# Before torch is imported. With more threads equal calls may differ in the last bit, as memory
# alignment decides what each gets; and they spin at barriers while other tests have the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: what is submitted is judged by what it changes, not by chance.
# `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=250)
settings.register_profile("search", deadline=None, max_examples=20_000)
settings.load_profile("repeatable")

# With all libraries imported a full collection looks at a million objects: at the usual thresholds
# that is an eighth of the time of the tests of a runtime. Tests of what must be freed collect.
gc.set_threshold(50_000, 20, 50)

StarterDir = Callable[[str], Path]


@pytest.fixture(scope="session")
def starter_dir(tmp_path_factory: pytest.TempPathFactory) -> StarterDir:
    """Gives the folder of a starter model, each built once for all tests."""
    cache_dir = tmp_path_factory.mktemp("starters")
    return lambda name: ensure_starter(name, cache_dir)


@pytest.fixture(autouse=True)
def no_bugs() -> Iterator[None]:
    """No test leaves a bug behind; one that causes a bug on purpose clears `FAULTS`."""
    FAULTS.clear()
    yield
    fault, FAULTS.first = FAULTS.first, None
    assert fault is None


@pytest.fixture
def unfrozen_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that starts collects and freezes all that this process has imported.

    Where other tests brought the libraries, that takes half a second; fakes need none of it.
    """
    monkeypatch.setattr(engine, "freeze_heap", lambda: None)
    monkeypatch.setattr(engine, "thaw_heap", lambda: None)
