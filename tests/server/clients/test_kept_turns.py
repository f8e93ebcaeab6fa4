"""Five turns of an agent, a kill of the server, and the sixth turn."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.server.clients.test_programs import PROGRAMS, PYTHON, run
from tests.server.real import Server, starter_config

pytestmark = pytest.mark.slow

KINDS = ("previous", "conversation")


def kill(server: Server) -> None:
    """Kill the supervisor, and then the process that serves."""
    children = psutil.Process(server.process.pid).children()
    for pid in (server.process.pid, *(child.pid for child in children)):
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    psutil.wait_procs(children)


def test_an_agent_goes_on_after_a_kill(tmp_path: Path) -> None:
    assert PYTHON.exists(), "scripts/setup-clients makes the environment"
    config = starter_config(tmp_path, ["tiny-qwen"])

    def turns(server: Server, kind: str, count: int) -> list[int]:
        program = [str(PYTHON), "kept_openai_agents.py", kind, str(tmp_path / kind), str(count)]
        return [int(line) for line in run(server, PROGRAMS, *program).split()]

    server = Server(tmp_path, ROUNDHOUSE_CONFIG=str(config))
    try:
        server.wait_ready()
        read = {kind: turns(server, kind, 5) for kind in KINDS}
        kill(server)
        server = Server(tmp_path, ROUNDHOUSE_CONFIG=str(config))
        server.wait_ready()
        for kind in KINDS:
            read[kind] += turns(server, kind, 1)
    finally:
        server.stop()
    for tokens in read.values():
        assert len(tokens) == 6
        assert tokens == sorted(set(tokens)), "each turn has all before it"
