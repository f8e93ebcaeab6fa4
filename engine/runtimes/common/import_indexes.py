"""The indexes of installed files that libraries build at every import, kept between starts.

Nothing here imports a library.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.files.atomic import new_file

FOLDER = "import-indexes"
"""The folder of the cache that has them."""

Structure = dict[frozenset[str], dict[str, set[str]]]
"""The names that modules offer, by module and by the packages that they need."""


@contextmanager
def kept_indexes(cache_dir: Path) -> Iterator[None]:
    """Import libraries inside this context, and keep their indexes in `cache_dir`.

    transformers reads all files of its models twice to learn which names they have (0.7 s of
    processor time). It and diffusers read the metadata of all installed packages (0.4 s each). An
    index is built anew when a file that it was built from has changed.
    """
    folder = cache_dir / FOLDER
    build = importlib.metadata.packages_distributions
    packages = functools.partial(_packages, folder, functools.cache(build))
    hook = _AfterImport("transformers.utils.import_utils", functools.partial(_keep_models, folder))
    importlib.metadata.packages_distributions = packages
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = build
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(hook)


class _AfterImport:
    """Finds one module where it usually is, and changes it as soon as it has run."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._change = change

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification, with a loader that applies the change."""
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            self._change(module)

        vars(spec.loader)["exec_module"] = run_and_change
        return spec


def _packages(
    folder: Path, build: Callable[[], Mapping[str, list[str]]]
) -> Mapping[str, list[str]]:
    """`importlib.metadata.packages_distributions`: the distributions of each package.

    Whatever installs or removes a distribution changes a folder of the search path.
    """
    stamps = []
    for place in sys.path:
        try:
            stamps.append((place, os.stat(place or ".").st_mtime_ns))
        except OSError:
            stamps.append((place, 0))
    found: Mapping[str, list[str]] = _kept(folder / "packages.json", stamps, build)
    return {package: [*names] for package, names in found.items()}


def _keep_models(folder: Path, import_utils: ModuleType) -> None:
    """Let transformers read the structure of its models from the index."""
    build = import_utils.define_import_structure
    models = os.path.join(os.path.dirname(os.path.dirname(import_utils.__file__ or "")), "models")
    stamps = functools.cache(functools.partial(_stamps, models))

    def build_lists() -> list[Any]:
        return [
            [sorted(needs), {module: sorted(names) for module, names in modules.items()}]
            for needs, modules in build(models).items()
        ]

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        path = os.fspath(module_path)
        if path not in (models, os.path.join(models, "__init__.py")):
            structure: Structure = build(module_path, prefix)
            return structure
        begin = "" if prefix is None else f"{prefix}."
        return {
            frozenset(needs): {begin + module: set(names) for module, names in modules.items()}
            for needs, modules in _kept(folder / "transformers.json", stamps(), build_lists)
        }

    vars(import_utils)["define_import_structure"] = define_import_structure


def _stamps(folder: str) -> list[tuple[str, int, int]]:
    """Path, time and size of each file."""
    stamps: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    stamps += _stamps(entry.path)
            else:
                stat = entry.stat()
                stamps.append((entry.path, stat.st_mtime_ns, stat.st_size))
    return sorted(stamps)


def _kept(path: Path, stamps: object, build: Callable[[], Any]) -> Any:
    """What `path` has, if it was built from files with these stamps. Otherwise it is built."""
    made_from = [platform.python_version(), repr(stamps)]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        document = json.loads(path.read_bytes())
        if document["key"] == key:
            return document["index"]
    index = build()
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, durable=False) as file:
            file.write_text(json.dumps({"key": key, "index": index}), encoding="utf-8")
    return index
