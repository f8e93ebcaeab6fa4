"""Measurements outlive a restart, and a disk that fails costs no more than the memory of them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from engine.config import Section
from engine.scheduling.estimates import FILE_NAME, EstimateStore
from tests.engine.scheduling.world import config, estimate

MODEL = config(["model"]).models[0]
FIRST, SECOND = estimate(100), estimate(200)


def store_of(folder: Path, device: str) -> EstimateStore:
    return EstimateStore(folder, device, lambda _: Section())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_measurement_outlives_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store_of(folder, "cpu").put(MODEL, FIRST)
    store_of(folder, "cpu").put_working_bytes(MODEL, "shape", 7)
    store = store_of(folder, "cpu")
    assert store.get(MODEL) == FIRST
    assert store.working_bytes(MODEL, "shape") == 7
    assert store_of(folder, "cuda").get(MODEL) is None
    assert names(folder) == [FILE_NAME]
    assert (folder / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_file_before_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(tmp_path, "cpu")
    store.put(MODEL, FIRST)

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        store.put(MODEL, SECOND)
    assert "No space left" in caplog.text
    assert names(tmp_path) == [FILE_NAME]
    assert store_of(tmp_path, "cpu").get(MODEL) == FIRST
    assert store.get(MODEL) == SECOND
    store.put(MODEL, SECOND)
    assert store_of(tmp_path, "cpu").get(MODEL) == SECOND
