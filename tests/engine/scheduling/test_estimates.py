"""Measurements outlive a restart, and a disk that fails costs no more than the memory of them."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.scheduling.estimates import FILE_NAME, MAX_SHAPES, EstimateStore
from engine.section import Section
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


class Slow(dict[str, Any]):
    """An entry of which the first look takes until a second thread had its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.looked, self.go_on = threading.Event(), threading.Event()

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key, default)
        if not self.looked.is_set():
            self.looked.set()
            self.go_on.wait(0.2)
        return found


def test_two_shapes_measured_at_once_are_both_remembered(tmp_path: Path) -> None:
    store = store_of(tmp_path, "device")
    entry = Slow()
    store._entries[store._key(MODEL)] = entry
    first = threading.Thread(target=store.put_working_bytes, args=(MODEL, "a", 1))
    first.start()
    entry.looked.wait(5)
    store.put_working_bytes(MODEL, "b", 2)
    entry.go_on.set()
    first.join()
    again = store_of(tmp_path, "device")
    for each in (store, again):
        assert (each.working_bytes(MODEL, "a"), each.working_bytes(MODEL, "b")) == (1, 2)


def test_the_shape_not_measured_for_longest_is_forgotten(tmp_path: Path) -> None:
    store = store_of(tmp_path, "device")
    for number in range(MAX_SHAPES):
        store.put_working_bytes(MODEL, str(number), number)
    store.put_working_bytes(MODEL, "0", 7)
    store.put_working_bytes(MODEL, "new", 8)
    assert store.working_bytes(MODEL, "1") is None
    assert store.working_bytes(MODEL, "0") == 7
    assert store.working_bytes(MODEL, "new") == 8
