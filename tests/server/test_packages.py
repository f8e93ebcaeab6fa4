"""The modules of the server: no circular imports, and packages that point downwards only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = ("commands", "bench", "serve", "app", "routes", "schemas")
"""From the top. A module imports from its own level or from lower ones; all others are lower."""


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted((ROOT / "server").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, also in functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else node.module)
    return found


GRAPH = {module: imports(path) & FILES.keys() for module, path in FILES.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles that a depth-first search meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def level(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return LEVELS.index(part) if part in LEVELS else len(LEVELS)


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert cycles(graph) == [["b", "c", "b"]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycles(GRAPH) == []


def test_imports_point_downwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if level(other) < level(module)
    ]
    assert upwards == []


@pytest.mark.parametrize("name", ["supervisor", "fallback_responder"])
def test_the_supervisor_needs_the_standard_library_only(name: str) -> None:
    waiting, seen = [f"server.supervision.{name}"], set[str]()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for other in imports(FILES[module]):
            if other in FILES:
                waiting += [other] if other not in seen else []
            else:
                assert other.partition(".")[0] in {*sys.stdlib_module_names, "server"}, module
