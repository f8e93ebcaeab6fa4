"""The packages that bring the weights of sample models.

They are pinned, with the sha256 of each file, in `constraints/samples.txt`. Their code never runs:
only their data files are read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def is_installed(module: str) -> bool:
    """Whether the package with this top-level module is installed. Imports nothing."""
    return find_spec(module) is not None


def package_folder(module: str) -> Path:
    """The folder of an installed package, by its top-level module. Imports nothing.

    Raises:
        ModuleNotFoundError: the package is not installed.

    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"there is no package {module}")
    return Path(spec.submodule_search_locations[0])
