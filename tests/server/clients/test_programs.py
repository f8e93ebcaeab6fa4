"""The client libraries of others against a real server, each in a process of its own.

Each program in `programs/` is a test file for its library. It runs in the environment that
`scripts/setup-clients` makes, with pytest or with Node.js's own test runner. All use one server.
Those that talk, `talk_*`, need models that know something: tests/quality runs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.real import ROOT, Server

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).parent / "programs"
ENVIRONMENT = ROOT / ".clients"
PYTHON = ENVIRONMENT / "bin" / "python"
NODE_MODULES = ENVIRONMENT / "node_modules"
TIMEOUT_S = 300.0
MAX_OUTPUT_CHARACTERS = 20_000


def run(server: Server, folder: Path, *command: str) -> str:
    """What the program writes. Failed tests of it fail this test, with their report."""
    own = {
        "ROUNDHOUSE_URL": server.url,
        "DO_NOT_TRACK": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise LiteLLM fetches the newest prices
        "NO_COLOR": "1",
    }
    # The environment is not compiled when it is made: what the first run imports, it keeps.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONDONTWRITEBYTECODE" and not name.startswith("PYTEST_")
    }
    result = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-MAX_OUTPUT_CHARACTERS:]
    return result.stdout


def run_pytest(server: Server, program: str) -> None:
    """A program of tests for pytest."""
    assert PYTHON.exists(), "scripts/setup-clients makes the environment"
    options = ["-c", "pytest.ini", "-q", "-p", "no:cacheprovider", "--tb=short", "--no-header"]
    output = run(server, PROGRAMS, str(PYTHON), "-m", "pytest", *options, program)
    assert re.search(r"^[1-9]\d* passed", output, re.MULTILINE), output


def run_node(server: Server, folder: Path, program: str) -> None:
    """A program of tests for Node.js. The folder is empty."""
    # Node.js looks for libraries in the folders above a program.
    (folder / "node_modules").symlink_to(NODE_MODULES)
    for name in ("starter.mjs", program):
        shutil.copy(PROGRAMS / name, folder)
    output = run(server, folder, "node", "--test", "--test-reporter=tap", program)
    assert re.search(r"^# pass [1-9]", output, re.MULTILINE), output


def needs_node(test: Callable[..., None]) -> Callable[..., None]:
    """Skip the test where there is no Node.js, or no library for it."""
    for holds, reason in (
        (shutil.which("node") is not None, "there is no Node.js"),
        (NODE_MODULES.exists(), ".clients was made without Node.js and npm"),
    ):
        test = pytest.mark.skipif(not holds, reason=reason)(test)
    return test


@pytest.mark.parametrize("program", sorted(path.name for path in PROGRAMS.glob("with_*.py")))
def test_python(server: Server, program: str) -> None:
    run_pytest(server, program)


@needs_node
@pytest.mark.parametrize("program", sorted(path.name for path in PROGRAMS.glob("with_*.mjs")))
def test_node(server: Server, tmp_path: Path, program: str) -> None:
    run_node(server, tmp_path, program)
