"""What the device says of its memory, against what others say of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from engine.memory.device import Device
from engine.memory.nvidia_smi import read_gpus
from tests.gpu.device import DEVICE, open_check_device, synchronize

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HELD = 768 * 2**20
CONTEXT = 1536 * 2**20
"""What a CUDA context and its kernels take at most beside what a program allocates."""

ERROR = 0.03

HOLD = """
import sys
if sys.argv[2] == "cuda":
    import torch
    held = torch.ones(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
else:
    held = bytearray(b"1") * int(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def device() -> Device:
    return open_check_device()


@contextmanager
def another_program() -> Iterator[None]:
    """A process that holds memory of the device."""
    command = [sys.executable, "-c", HOLD, str(HELD), DEVICE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.stdin.close()
            process.wait(30)


def test_the_capacity(device: Device) -> None:
    if DEVICE == "cuda":
        (gpu, *_) = read_gpus()
        assert device.total_bytes == pytest.approx(gpu.total_bytes, rel=ERROR)
        assert device.name == gpu.name
    else:
        assert 0 < device.total_bytes <= psutil.virtual_memory().total


def test_what_another_program_holds_is_external(device: Device) -> None:
    if DEVICE == "cpu":
        # Others, such as the other steps of a check, take and free memory at any time.
        assert device.external_bytes() > 0
    before, own = device.external_bytes(), device.own_bytes()
    with another_program():
        held = device.external_bytes()
        assert device.own_bytes() == pytest.approx(own, abs=16 * 2**20)
    if DEVICE == "cuda":
        assert HELD * 0.9 < held - before < HELD + CONTEXT
        assert device.external_bytes() == pytest.approx(before, abs=HELD // 2)


def test_own_and_external_bytes_are_what_the_driver_shows(device: Device, cuda: None) -> None:
    import torch

    held = torch.ones(HELD, dtype=torch.uint8, device="cuda")
    synchronize()
    assert device.own_bytes() >= HELD
    (gpu, *_) = read_gpus()
    # The driver's total has some hundred MB more, which it keeps for itself.
    free = device.total_bytes - device.own_bytes() - device.external_bytes()
    assert free == pytest.approx(gpu.free_bytes, abs=128 * 2**20)
    del held
    device.release_cached()
    assert device.own_bytes() < HELD


def test_a_check_does_not_wait_for_the_queue_of_kernels(device: Device) -> None:
    import torch

    device.check()
    one = torch.ones(4096, 4096, device=DEVICE) if DEVICE == "cuda" else torch.ones(64, 64)
    for _ in range(500):
        one = one @ one * 1e-4
    began = time.perf_counter()
    device.check()
    assert time.perf_counter() - began < 1.0
    synchronize()
