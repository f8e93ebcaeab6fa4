"""Weights alone: parked, woken, and refused where there is no room."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from engine.memory.host_memory import HostMemory, HostMemoryFull
from engine.memory.weights import Weights
from tests.gpu.device import DEVICE, only_free, used_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SIDE = 4096 if DEVICE == "cuda" else 1024
COUNT, SHAPE = 24, (SIDE, SIDE)
NBYTES = COUNT * 4 * SHAPE[0] * SHAPE[1]
SLACK = NBYTES // 4


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(2 * NBYTES, pinned=DEVICE == "cuda")
    yield host
    assert host.used_bytes == 0


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    for index in range(COUNT):
        tensor = torch.full(SHAPE, float(index + 1))
        made.register_parameter(f"p{index}", torch.nn.Parameter(tensor, requires_grad=False))
    return made


def values(module: torch.nn.Module) -> list[float]:
    """The mean of each: whether all of it is right, without another copy."""
    return [float(each.double().mean()) for each in module.parameters()]


def test_a_park_gives_the_bytes_back_and_a_wake_brings_the_same(host: HostMemory) -> None:
    made = module()
    weights = Weights.adopt({"all": [made]}, host, DEVICE)
    expected = values(made)
    assert expected == [index + 1 for index in range(COUNT)]
    assert weights.host_bytes == host.used_bytes >= NBYTES
    full = used_bytes()
    for _ in range(3):
        weights.park(["all"])
        gc.collect()
        assert full - used_bytes() == pytest.approx(NBYTES, abs=SLACK)
        weights.wake(["all"])
        assert used_bytes() == pytest.approx(full, abs=SLACK)
        assert values(made) == expected
        assert {each.device.type for each in made.parameters()} == {DEVICE}
    weights.close()


def test_the_host_copies_are_pinned_and_within_their_budget(host: HostMemory, cuda: None) -> None:
    first = host.allocate(NBYTES)
    assert first.is_pinned()
    with pytest.raises(HostMemoryFull):
        host.allocate(2 * NBYTES)
    assert host.used_bytes >= NBYTES
    host.free(first)


def test_a_wake_without_room_leaves_them_parked(host: HostMemory) -> None:
    made = module()
    weights = Weights.adopt({"all": [made]}, host, DEVICE)
    expected = values(made)
    weights.park(["all"])
    # On a CPU torch has no type of its own for that.
    with only_free(NBYTES // 2), pytest.raises((torch.OutOfMemoryError, RuntimeError, OSError)):
        weights.wake(["all"])
    assert all(each.numel() == 0 for each in made.parameters())
    weights.wake(["all"])
    assert values(made) == expected
    weights.close()
