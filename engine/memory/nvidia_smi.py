"""What `nvidia-smi` reports about the GPUs, without importing torch."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import dataclass

TIMEOUT_S = 20.0
"""A driver that was idle for a while takes seconds to wake up. A broken driver never does."""

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU."""

    index: int
    name: str
    driver: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A program that computes on a GPU."""

    pid: int
    name: str
    used_bytes: int | None
    """None if the driver does not report it, as in a container."""


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs; none if there is no driver.

    Raises:
        OSError: `nvidia-smi` failed. The message is its own.

    """
    rows = _query("--query-gpu=index,name,driver_version,memory.total,memory.free")
    return tuple(
        Gpu(int(index), name, driver, int(float(total)) * MIB, int(float(free)) * MIB)
        for index, name, driver, total, free in rows
    )


def read_processes() -> tuple[GpuProcess, ...]:
    """The programs on the GPUs, as far as this container sees them.

    Raises:
        OSError: `nvidia-smi` failed. The message is its own.

    """
    rows = _query("--query-compute-apps=pid,process_name,used_memory")
    return tuple(
        GpuProcess(int(pid), name, int(used) * MIB if used.isdecimal() else None)
        for pid, name, used in rows
    )


def _query(question: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, question, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"nvidia-smi does not answer in {TIMEOUT_S:.0f} s") from error
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        raise OSError(said[0] if said else f"nvidia-smi ended with status {answer.returncode}")
    return list(csv.reader(answer.stdout.splitlines(), skipinitialspace=True))
