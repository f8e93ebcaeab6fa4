"""Who may import whom: the engine knows no web framework, the server no tensor library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = {"fastapi", "starlette", "uvicorn"}
NATIVE = {"torch", "vllm", "transformers", "diffusers", "faster_whisper", "kokoro", "TTS"}


def imported(path: Path) -> Iterator[str]:
    """The top-level packages a file imports anywhere, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


def offenders(package: str, forbidden: set[str]) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        if name in forbidden
    ]


def test_the_engine_imports_no_web_framework_and_no_server() -> None:
    assert offenders("engine", WEB | {"server"}) == []


def test_the_server_imports_no_native_library() -> None:
    assert offenders("server", NATIVE) == []


def loaded_after(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after a statement."""
    code = f"import json, sys; {statement}; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "module", ["engine.engine", "server.app", "server.commands.cli", "engine.starters.registry"]
)
def test_importing_loads_no_native_library(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & NATIVE


@pytest.mark.parametrize("module", ["engine.engine", "engine.runtimes.vllm.runtime"])
def test_the_engine_can_be_imported_without_a_web_framework(module: str) -> None:
    assert not loaded_after(f"import {module}") & WEB


def test_a_command_begins_without_what_only_the_server_needs() -> None:
    assert not loaded_after("import server.commands.cli") & WEB
