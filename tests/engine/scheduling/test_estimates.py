"""What is remembered of models and runs."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.runtimes.registry import REGISTRY
from engine.scheduling.estimates import MAX_SHAPES, EstimateStore


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    return ModelConfig(id="m", runtime="fake", source="none")


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


def test_two_shapes_measured_at_once_are_both_remembered(
    tmp_path: Path, model: ModelConfig
) -> None:
    store = EstimateStore(tmp_path, "device")
    entry = Slow()
    store._entries[store._key(model)] = entry
    first = threading.Thread(target=store.put_working_bytes, args=(model, "a", 1))
    first.start()
    entry.looked.wait(5)
    store.put_working_bytes(model, "b", 2)
    entry.go_on.set()
    first.join()
    again = EstimateStore(tmp_path, "device")
    for each in (store, again):
        assert (each.working_bytes(model, "a"), each.working_bytes(model, "b")) == (1, 2)


def test_the_shape_not_measured_for_longest_is_forgotten(
    tmp_path: Path, model: ModelConfig
) -> None:
    store = EstimateStore(tmp_path, "device")
    for number in range(MAX_SHAPES):
        store.put_working_bytes(model, str(number), number)
    store.put_working_bytes(model, "0", 7)
    store.put_working_bytes(model, "new", 8)
    assert store.working_bytes(model, "1") is None
    assert store.working_bytes(model, "0") == 7
    assert store.working_bytes(model, "new") == 8


def test_a_full_disk_costs_the_memory_of_it_and_leaves_nothing(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EstimateStore(tmp_path, "device")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for number in range(3):
        store.put_working_bytes(model, "a", number)
    assert store.working_bytes(model, "a") == 2
    assert not list(tmp_path.iterdir())
