"""Refuses to load a native library, in the process of the tests and in each Python below it.

Python imports a module of this name when it starts. `guard` puts this folder on the path of child
processes, so the guard also holds in servers and programs that a test starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NATIVE = frozenset(
    (
        "TTS",
        "ctranslate2",
        "diffusers",
        "faster_whisper",
        "kokoro",
        "onnx_asr",
        "pocket_tts",
        "sherpa_onnx",
        "torch",
        "transformers",
        "vllm",
    )
)
"""The libraries that run models, by the names of their packages."""

RECORD = "NATIVE_IMPORTS_RECORD"
"""The environment variable that names the file with a line for each refused import."""


class NativeLibraryRefused(RuntimeError):
    """A quick test has tried to import a native library.

    It is no ImportError, as much code takes that for an optional library that is not installed.
    """


class Refusing(MetaPathFinder, Loader):
    """Finds native libraries as usual, but records and refuses their import.

    A test may read the source of a library, so `importlib.util.find_spec` still finds it.
    """

    def __init__(self, record: Path) -> None:
        self._record = record

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a native library, with this object as its loader."""
        spec = PathFinder.find_spec(name, path, target) if name in NATIVE else None
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Record the attempt, as the code under test may catch the error.

        Raises:
            NativeLibraryRefused: always.

        """
        with self._record.open("a") as file:
            file.write(f"{spec.name}\n")
        raise NativeLibraryRefused(f"a quick test imports {spec.name}")

    def exec_module(self, module: ModuleType) -> None:
        """Never called, as there is no module."""


def guard(record: Path) -> None:
    """Refuse native libraries in this process and in those that it starts from now on."""
    sys.meta_path.insert(0, Refusing(record))
    os.environ[RECORD] = str(record)
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


if RECORD in os.environ:
    sys.meta_path.insert(0, Refusing(Path(os.environ[RECORD])))
