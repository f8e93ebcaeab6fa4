"""The device that holds the models: its memory, and how much of it is external."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil

from engine.errors import ConfigError
from engine.memory import malloc

CGROUP = Path("/sys/fs/cgroup")


class Device(ABC):
    """One memory that models share."""

    kind: ClassVar[str]
    name: str
    total_bytes: int

    @abstractmethod
    def external_bytes(self) -> int:
        """Bytes in use now by anything but our models. Cheap, and measured at every call."""

    @abstractmethod
    def own_bytes(self) -> int:
        """Bytes that this process uses now, less those before its first model. Cheap."""

    def check(self) -> None:  # noqa: B027 - host memory has no state that could be lost
        """Do a trivial computation on the device and wait for it. Call it inside `GATE.step()`.

        Raises:
            Exception: any error of the device's library. Nothing works there any more: the CUDA
                errors that a trivial call meets are sticky, and last as long as the process.

        """

    def set_baseline(self) -> None:  # noqa: B027 - only host memory mixes libraries with models
        """Count what the process uses now, after the imports and before any model, as external."""

    def release_weights(self) -> None:  # noqa: B027 - the C library gives large blocks back at once
        """Give the memory of parked weights back to the device, if an allocator keeps it."""

    @abstractmethod
    def release_cached(self) -> None:
        """Give memory that an allocator keeps for later back to the device."""


class CpuDevice(Device):
    """Host memory, or as much of it as the container's limit allows."""

    kind: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        self.name = platform.processor() or platform.machine()
        self._process = psutil.Process()
        self._limit_bytes = _cgroup_number("memory.max")
        self.total_bytes = host_memory_bytes()
        self.set_baseline()
        malloc.share_one_heap()

    def set_baseline(self) -> None:
        """Record the process's memory now, as the part that is not a model."""
        self._baseline_bytes = self._process.memory_info().rss

    def external_bytes(self) -> int:
        """The memory of other processes, and of this process before its first model."""
        memory = psutil.virtual_memory()
        used_bytes = memory.total - memory.available
        if self._limit_bytes is not None:
            # The page cache of files counts towards the limit, but is freed on demand.
            cache_bytes = _cgroup_stat("inactive_file")
            used_bytes = (_cgroup_number("memory.current") or used_bytes) - cache_bytes
        others_bytes = max(0, used_bytes - self._process.memory_info().rss)
        return others_bytes + self._baseline_bytes

    def own_bytes(self) -> int:
        """The process's memory, less its memory at `set_baseline`."""
        return int(self._process.memory_info().rss - self._baseline_bytes)

    def release_cached(self) -> None:
        """Give the free pages of the C library's heap back to the system."""
        malloc.trim()


class CudaDevice(Device):
    """The first visible NVIDIA GPU."""

    kind: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        # Otherwise an allocation of parkable memory, which calls Python, holds torch's lock.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "release_lock_on_cudamalloc:True")
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("engine.device: no CUDA device answers")
        self._torch = torch
        torch.cuda.init()
        self.name = torch.cuda.get_device_name()
        self.total_bytes = torch.cuda.mem_get_info()[1]
        self.unmapped_bytes: Callable[[], int] = lambda: 0
        """Bytes that torch counts as reserved, but that are only addresses."""
        # Made now, so that a check needs no memory. Its stream has priority over the models'
        # kernels: a check waits for the kernel that runs, and not for those in the queue.
        self._checked = torch.zeros(1, device="cuda")
        self._checks = torch.cuda.Stream(priority=-1)

    def check(self) -> None:
        """Add two numbers on a separate stream."""
        with self._torch.cuda.stream(self._checks):
            self._checked.add_(1)
        self._checks.synchronize()

    def synchronize(self) -> None:
        """Wait until the GPU has done all work of this process."""
        self._torch.cuda.synchronize()

    def external_bytes(self) -> int:
        """Bytes that the GPU reports as used, beyond those that our allocator reserved.

        They include the CUDA context and loaded kernels, besides other programs.
        """
        free_bytes, total_bytes = self._torch.cuda.mem_get_info()
        return max(0, int(total_bytes - free_bytes) - self.own_bytes())

    def own_bytes(self) -> int:
        """What torch holds of the GPU. Other libraries keep their own counts."""
        return int(self._torch.cuda.memory_reserved()) - self.unmapped_bytes()

    def release_weights(self) -> None:
        """Empty torch's caching allocator, because other libraries allocate beside it."""
        self._torch.cuda.empty_cache()

    def release_cached(self) -> None:
        """Empty torch's caching allocator."""
        self._torch.cuda.empty_cache()


def open_device(kind: str) -> Device:
    """The device that the configuration names. `auto` takes a GPU if one answers.

    May import torch (seconds).

    Raises:
        ConfigError: there is no such device.

    """
    if kind == "cuda" or (kind == "auto" and has_nvidia_gpu()):
        return CudaDevice()
    return CpuDevice()


def host_memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less."""
    total_bytes = psutil.virtual_memory().total
    return min(total_bytes, _cgroup_number("memory.max") or total_bytes)


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    answer = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


def _cgroup_number(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_stat(name: str) -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines)
    return int(values.get(name, 0))
