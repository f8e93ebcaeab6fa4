"""The device of the checks: a card, or the host where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from engine.memory.device import CpuDevice, CudaDevice, Device

VARIABLE = "CHECK_GPU_DEVICE"

CACHE = "CHECK_GPU_CACHE"
"""The variable that names the cache of the starters, which all steps share."""

DEVICE = os.environ.get(VARIABLE, "cuda")
"""`cuda`, or `cpu` where the variable says so."""


def open_check_device() -> Device:
    """The engine's own view of it."""
    return CudaDevice() if DEVICE == "cuda" else CpuDevice()


def synchronize() -> None:
    """Wait until the device has done all work."""
    if DEVICE == "cuda":
        import torch

        torch.cuda.synchronize()


def used_bytes() -> int:
    """Bytes in use on the device: by everybody on a card, by this process on a CPU."""
    if DEVICE != "cuda":
        return int(psutil.Process().memory_info().rss)
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def free_bytes() -> int:
    """Bytes that nobody uses on the device."""
    if DEVICE != "cuda":
        return int(psutil.virtual_memory().available)
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@contextmanager
def only_free(nbytes: int) -> Iterator[None]:
    """Leave only that much room, without the engine's knowledge: its next allocations fail.

    On a card a tensor of our own process fills it, which no count of ours sees as external. On a
    CPU the system refuses this process more private memory.
    """
    if DEVICE == "cuda":
        import torch

        hog = torch.empty(max(0, free_bytes() - nbytes), dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del hog
            torch.cuda.empty_cache()
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """The private memory of this process as RLIMIT_DATA counts it (VmData of proc(5))."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel tells no VmData")
