"""Fixtures that tests of the engine and of the server share, and the option `--quick`.

A quick run leaves out the tests that are marked `slow`: those that load a native library, and
files that wait long. It fails where any other test loads a native library.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from engine import engine
from engine.process.faults import FAULTS
from engine.samples.registry import SAMPLES, can_build_all, ensure_sample
from engine.starters.registry import ensure_starter
from tests.quick import sitecustomize

# Before torch is imported. With more threads equal calls may differ in the last bit, as memory
# alignment decides what each gets; and they spin at barriers while other tests have the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# What was used is kept in the data folder, also by engines of tests that name none.
_DATA = tempfile.TemporaryDirectory(prefix="roundhouse-data-")
os.environ["XDG_DATA_HOME"] = _DATA.name

# For the processes of pytest-xdist, which have a second thread before any of our code runs
# (`engine.memory.malloc`). Tests measure what a park gives back to the system.
os.environ["MALLOC_ARENA_MAX"] = "1"

# The same examples in every run: what is submitted is judged by what it changes, not by chance.
# `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=250)
settings.register_profile("search", deadline=None, max_examples=20_000)
settings.load_profile("repeatable")
# Of a quick run, in which other tests count for more of the time.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=25)

# With all libraries imported a full collection looks at a million objects: at the usual thresholds
# that is an eighth of the time of the tests of a runtime. Tests of what must be freed collect.
gc.set_threshold(50_000, 20, 50)

ROOT = Path(__file__).parents[1]

StarterDir = Callable[[str], Path]

RECORD = pytest.StashKey[Path]()
"""The file with a line for each native library that a quick run refused."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that load no native library")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        if loaded := sitecustomize.NATIVE & sys.modules.keys():
            raise pytest.UsageError(f"{', '.join(sorted(loaded))}: loaded before the first test")
        descriptor, name = tempfile.mkstemp(prefix="roundhouse-native-")
        os.close(descriptor)
        config.stash[RECORD] = Path(name)
        sitecustomize.guard(config.stash[RECORD])
        settings.load_profile("quick")


def pytest_unconfigure(config: pytest.Config) -> None:
    if RECORD in config.stash:
        config.stash[RECORD].unlink()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether to leave out a file: a slow one is not even imported, as it may import torch."""
    if not config.getoption("quick") or collection_path.suffix != ".py":
        return None
    tree = ast.parse(collection_path.read_text(encoding="utf-8"))
    marks = (
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    )
    return any("mark.slow" in each for each in marks) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a quick test that has tried to load a native library, even where it caught the error."""
    report = yield
    record = item.config.stash.get(RECORD, None)
    if record is not None and (refused := record.read_text().split()):
        record.write_text("")
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} loads {', '.join(sorted(set(refused)))}. Mark it `slow`, which"
            " `--quick` leaves out, or let it do without."
        )
    return report


@pytest.fixture(scope="session")
def starter_dir(tmp_path_factory: pytest.TempPathFactory) -> StarterDir:
    """Gives the folder of a starter model, each built once for all tests."""
    cache_dir = tmp_path_factory.mktemp("starters")
    return lambda name: ensure_starter(name, cache_dir)


@pytest.fixture(scope="session")
def sample_cache(pytestconfig: pytest.Config) -> Path:
    """A cache with all sample models: built once for each state of the code that builds them."""
    if not can_build_all():
        pytest.skip("no sample models: scripts/setup --no-samples, or it could not fetch them")
    digest = hashlib.sha256()
    for package in ("samples", "conversion", "starters"):
        for path in sorted((ROOT / "engine" / package).rglob("*.py")):
            digest.update(path.read_bytes())
    assert pytestconfig.cache is not None
    path = pytestconfig.cache.mkdir(f"samples-{digest.hexdigest()[:16]}")
    for name in SAMPLES:
        ensure_sample(name, path)
    return path


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
