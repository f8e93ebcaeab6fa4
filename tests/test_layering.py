"""What may import what: the engine no web framework, the server no tensor library.

Packages point downwards only, and no modules import one another in a circle. Imports in functions
and under TYPE_CHECKING count as well: a circle that only a type checker sees is one to the reader.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = {"fastapi", "starlette", "uvicorn"}
NATIVE = {
    "torch", "vllm", "transformers", "diffusers", "faster_whisper", "kokoro", "TTS", "onnx_asr",
    "pocket_tts",
    "sherpa_onnx",
}  # fmt: skip

LAYERS = (
    ("server.commands",),
    ("server.bench",),
    ("server.serve",),
    ("server.app",),
    ("server.routes",),
    ("server.openapi",),
    ("server.mcp",),
    ("server.tracing",),
    ("server.ollama",),
    ("server.file_search",),
    ("server.realtime",),
    ("server.schemas",),
    ("server.responses",),
    ("server.response_cache",),
    ("server.batches",),
    ("server.vector_stores",),
    ("server.stored_files",),
    ("server",),
    ("server.websocket",),
    ("server.keys",),
    ("engine.jobs",),
    ("engine.simulation",),
    ("engine.spoken_transcript",),
    ("engine.engine",),
    ("engine.dispatch",),
    ("engine.preloading", "engine.model_loras"),
    ("engine.session", "engine.run", "engine.admission", "engine.activity"),
    ("engine.catalog", "engine.costs"),
    ("engine.routing",),
    ("engine.residency", "engine.metrics"),
    ("engine.runtimes",),
    ("engine.model_folder",),
    ("engine.samples",),
    ("engine.starters", "engine.conversion"),
    ("engine.scheduling",),
    ("engine.process",),
    ("engine.memory",),
    ("engine.media",),
    ("engine.files",),
    ("engine.tracing",),
    ("engine.events",),
    ("engine.requests",),
    ("engine.status",),
    ("engine.config",),
    ("engine.route_config", "engine.cost_config"),
    ("engine.section", "engine.usage", "engine.caller"),
    ("engine.errors", "engine.rules", "engine.units", "engine.words"),
)
"""From the top. A module belongs to the longest name that it begins with, and may import its own
layer and those below."""

KNOWN: set[tuple[str, str]] = set()
"""Imports that break these rules and are still to be cut. This table may only shrink."""

Graph = Mapping[str, frozenset[str]]


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
    assert not loaded_after("import server.commands.cli") & (WEB | {"av", "numpy"})


def modules_under(root: Path) -> dict[str, Path]:
    """Every module of the engine and the server, by name."""
    found = {}
    for package in ("engine", "server"):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported_modules(name: str, path: Path) -> Iterator[str]:
    """What a module imports, in any form. It may name attributes and foreign packages as well."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "module:attribute", which a registry imports by name
            module, colon, attribute = node.value.partition(":")
            if colon and attribute.isidentifier():
                yield module


def import_graph(root: Path) -> Graph:
    """What each module imports of the others. Packages do not count: theirs are empty."""
    modules = modules_under(root)
    files = {name for name, path in modules.items() if path.name != "__init__.py"}
    return {
        name: frozenset(imported_modules(name, path)) & files - {name}
        for name, path in modules.items()
    }


@cache
def project_graph() -> Graph:
    graph = import_graph(ROOT)
    assert len(graph) > 100
    return graph


def layer(module: str) -> int:
    """The number of a module's layer; higher is further down."""
    prefixes = {
        prefix: number
        for number, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if f"{module}.".startswith(f"{prefix}.")
    }
    assert prefixes, f"{module} is in no layer"
    return prefixes[max(prefixes, key=len)]


def upward(graph: Graph) -> set[tuple[str, str]]:
    """Imports of a layer above."""
    return {
        (name, other)
        for name, others in graph.items()
        for other in others
        if layer(other) < layer(name)
    }


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import one another, directly or through others."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        todo = [name]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        return found

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def without_known(graph: Graph) -> Graph:
    return {
        name: frozenset(other for other in others if (name, other) not in KNOWN)
        for name, others in graph.items()
    }


def test_packages_import_only_what_stands_below_them() -> None:
    assert sorted(upward(without_known(project_graph()))) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(without_known(project_graph())) == []


def test_every_known_violation_is_still_one() -> None:
    graph = project_graph()
    above, groups = upward(graph), circles(graph)
    gone = {
        (name, other)
        for name, other in KNOWN
        if other not in graph.get(name, ())
        or ((name, other) not in above and not any({name, other} <= set(g) for g in groups))
    }
    assert gone == set(), "take these out of KNOWN"


def test_every_layer_has_modules() -> None:
    used = {layer(name) for name in project_graph() if "." in name or name == "server"}
    assert used == set(range(len(LAYERS)))


def test_every_form_of_an_import_is_found(tmp_path: Path) -> None:
    sources = {
        "engine/__init__.py": "",
        "engine/files/__init__.py": "",
        "engine/errors.py": "",
        "engine/units.py": "from engine import errors",
        "engine/config.py": "def late():\n    import engine.units",
        "engine/status.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from engine.config import Config",
        "engine/files/hub.py": "from ..status import ModelState\nfrom . import sources",
        "engine/files/sources.py": 'REGISTRY = {"hub": "engine.files.hub:Hub"}',
        "server/__init__.py": "",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    graph = import_graph(tmp_path)
    assert {name: sorted(others) for name, others in graph.items() if others} == {
        "engine.units": ["engine.errors"],
        "engine.config": ["engine.units"],
        "engine.status": ["engine.config"],
        "engine.files.hub": ["engine.files.sources", "engine.status"],
        "engine.files.sources": ["engine.files.hub"],
    }
    assert upward(graph) == set()
    assert circles(graph) == [["engine.files.hub", "engine.files.sources"]]
    assert upward(
        {"engine.errors": frozenset({"engine.config"}), "engine.config": frozenset()}
    ) == {("engine.errors", "engine.config")}
