"""The device of these tests, and the record that a step of `scripts/check-gpu` keeps of them.

They need a card. On a CPU they run where `CHECK_GPU_DEVICE=cpu` asks for it: what only a
card has is skipped then, and the rest is debugged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.memory.device import has_nvidia_gpu
from tests.gpu.device import CACHE, DEVICE
from tests.gpu.record import Outcome, Record

WHY_CHARACTERS = 4000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not has_nvidia_gpu():
        skip = pytest.mark.skip(reason="no NVIDIA GPU answers")
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    record = Record.of_this_step()
    # A test that was skipped or has failed in its set-up has no call.
    if record is None or (report.when != "call" and report.passed):
        return
    why = str(report.longrepr)[-WHY_CHARACTERS:] if report.longrepr and not report.passed else ""
    record.add(Outcome(report.nodeid, report.outcome, round(report.duration, 2), why))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the starters, which the steps of a check share."""
    return Path(os.environ.get(CACHE) or tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cuda() -> Iterator[None]:
    """For tests of what only a card has."""
    if DEVICE != "cuda":
        pytest.skip("only a card has that")
    yield
