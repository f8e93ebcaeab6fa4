"""A CUDA context that is lost: the process is replaced, and its models come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from server.bench.target_commands import import_path
from tests.gpu.device import DEVICE
from tests.server.real import ROOT, free_port

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

REPLACED_S = 30.0
BACK_S = 60.0
START_S = 120.0

IMAGES = {
    "runtime": "diffusers",
    "task": "image",
    "options": {"dtype": "float32", "width": 64, "height": 64},
}
MODELS = (
    {"id": "image", "source": "starter:tiny-sd15", **IMAGES},
    {"id": "other", "source": "starter:tiny-sdxl", **IMAGES},
)
"""Of one library: its import is most of a start."""


def engine(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/v1/engine", timeout=5)
        return dict(answer.json()) if answer.status_code == 200 else {}
    except (httpx.TransportError, ValueError):
        return {}


def residents(url: str) -> set[str]:
    return {m["id"] for m in engine(url).get("models", ()) if m["state"] == "resident"}


def paint(url: str, model: str) -> int:
    """The status of an image."""
    body = {"model": model, "prompt": "a red train", "size": "64x64"}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=START_S).status_code


def wait_for(done: Any, limit_s: float, log: Path) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < limit_s, log.read_text()[-6000:]
        time.sleep(0.1)
    return time.monotonic() - began


def test_it_is_replaced_and_its_models_come_back(cache_dir: Path, tmp_path: Path) -> None:
    folders = {f"{each}_dir": str(tmp_path / each) for each in ("state", "data")}
    folders["cache_dir"] = str(cache_dir)
    config = tmp_path / "config.yaml"
    document = {"engine": {"device": DEVICE, "memory": "4GiB", **folders}, "models": MODELS}
    config.write_text(yaml.safe_dump(document))
    port, log = free_port(), tmp_path / "server.log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.gpu.serve_poisoned", "serve"]
    command += ["--config", str(config), "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": import_path(ROOT)},
        )  # fmt: skip
    try:
        wait_for(lambda: engine(url), START_S, log)
        assert paint(url, "image") == paint(url, "other") == 200
        assert residents(url) == {"image", "other"}
        (child,) = (
            each
            for each in psutil.Process(server.pid).children(recursive=True)
            if "serve_poisoned" in " ".join(each.cmdline())
        )
        os.kill(child.pid, signal.SIGUSR2)
        wait_for(lambda: not child.is_running() or child.status() == "zombie", REPLACED_S, log)
        took_s = wait_for(lambda: residents(url) == {"image", "other"}, BACK_S, log)
        assert engine(url)["restarts"]["count"] == 1, took_s
        assert paint(url, "image") == 200
    finally:
        server.terminate()
        server.wait(60)
