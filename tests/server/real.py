"""A real server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import httpx
import yaml

from server.settings import STARTER_CONFIG

START_S = 180.0
STOP_S = 60.0
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def starter_config(folder: Path, ids: Collection[str]) -> Path:
    """Write the starter configuration with these models alone: its server starts the sooner."""
    document = yaml.safe_load(STARTER_CONFIG.read_text(encoding="utf-8"))
    document["models"] = [model for model in document["models"] if model["id"] in ids]
    assert len(document["models"]) == len(ids)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


class Server:
    """`roundhouse serve` in a child process."""

    def __init__(self, home: Path, *arguments: str, **environ: str) -> None:
        port = free_port()
        code = "from server.commands.cli import main; main()"
        own = {
            "HF_HUB_OFFLINE": "1",
            "ROUNDHOUSE_CONFIG": str(STARTER_CONFIG),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
        }
        self._start(
            port,
            [sys.executable, "-c", code, "serve", "--port", str(port), *arguments],
            ROOT,
            {**os.environ, **own, **environ},
            home / "server.log",
        )

    def _start(
        self, port: int, command: list[str], folder: Path, environ: dict[str, str], log: Path
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environ
            )

    def wait_ready(self) -> None:
        """Poll as an orchestrator does."""
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()

    def log(self) -> str:
        return self._log.read_text()
