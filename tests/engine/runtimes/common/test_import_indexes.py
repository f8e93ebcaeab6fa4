"""Indexes of installed files that are kept between starts."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from engine.runtimes.common.import_indexes import FOLDER, kept_indexes
from engine.runtimes.common.late_imports import late_module

pytestmark = pytest.mark.slow
"""Its own library is called transformers, and no quick test may load that."""


UTILS = """
import os
scans = []

def define_import_structure(module_path, prefix=None):
    folder = module_path if os.path.isdir(module_path) else os.path.dirname(module_path)
    scans.append(folder)
    names = {each[:-3] for each in os.listdir(folder) if each.endswith(".py")}
    begin = "" if prefix is None else prefix + "."
    return {frozenset({"torch"}): {begin + name: {name.upper()} for name in names}}
"""
"""What `transformers.utils.import_utils` has, as far as it matters."""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in place of transformers, which has one model."""
    folder = tmp_path / "site" / "transformers"
    for package in ("", "utils", "models", "other"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "utils" / "import_utils.py").write_text(UTILS)
    (folder / "models" / "bert.py").touch()
    monkeypatch.syspath_prepend(folder.parent)
    real = forget_library()
    yield folder
    forget_library()
    sys.modules.update(real)


def forget_library() -> dict[str, ModuleType]:
    """As if it had not been imported; what was."""
    names = [name for name in sys.modules if name.partition(".")[0] == "transformers"]
    return {name: sys.modules.pop(name) for name in names}


def import_utils(cache_dir: Path) -> ModuleType:
    """The module of a new process."""
    forget_library()
    with kept_indexes(cache_dir):
        return importlib.import_module("transformers.utils.import_utils")


def test_models_are_read_once(library: Path, tmp_path: Path) -> None:
    for start in range(2):
        utils = import_utils(tmp_path)
        for _ in range(2):
            structure = utils.define_import_structure(library / "models", prefix="models")
            assert {"models.bert": {"BERT"}}.items() <= structure[frozenset({"torch"})].items()
            structure.clear()  # each caller may change its own
        file = str(library / "models" / "__init__.py")
        assert utils.define_import_structure(file)[frozenset({"torch"})]["bert"] == {"BERT"}
        assert len(utils.scans) == (start == 0)
        utils.define_import_structure(library / "other")
        assert len(utils.scans) == 1 + (start == 0)


def test_a_changed_model_is_read_again(library: Path, tmp_path: Path) -> None:
    import_utils(tmp_path).define_import_structure(library / "models")
    (library / "models" / "llama.py").touch()
    utils = import_utils(tmp_path)
    assert "llama" in utils.define_import_structure(library / "models")[frozenset({"torch"})]
    os.utime(library / "models" / "bert.py", (1, 1))
    utils = import_utils(tmp_path)
    utils.define_import_structure(library / "models")
    assert utils.scans


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}'])
def test_a_damaged_index_is_replaced(library: Path, tmp_path: Path, damage: bytes) -> None:
    import_utils(tmp_path).define_import_structure(library / "models")
    path = tmp_path / FOLDER / "transformers.json"
    path.write_bytes(damage)
    structure = import_utils(tmp_path).define_import_structure(library / "models")
    assert structure[frozenset({"torch"})]["bert"] == {"BERT"}
    assert json.loads(path.read_bytes())["index"]


def test_a_cache_that_cannot_be_written_does_not_matter(library: Path, tmp_path: Path) -> None:
    (tmp_path / FOLDER).touch()
    structure = import_utils(tmp_path).define_import_structure(library / "models")
    assert structure[frozenset({"torch"})]["bert"] == {"BERT"}


def test_packages_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []

    def look_up() -> dict[str, list[str]]:
        lookups.append(1)
        return {"PIL": ["pillow"]}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", look_up)
    for _ in range(2):
        with kept_indexes(tmp_path):
            assert importlib.metadata.packages_distributions() == {"PIL": ["pillow"]}
    assert len(lookups) == 1
    assert importlib.metadata.packages_distributions is look_up
    installed = tmp_path / "another-place"
    installed.mkdir()
    monkeypatch.syspath_prepend(installed)
    with kept_indexes(tmp_path):
        importlib.metadata.packages_distributions()
    (installed / "new.dist-info").mkdir()
    os.utime(installed, (1, 1))
    with kept_indexes(tmp_path):
        importlib.metadata.packages_distributions()
    assert len(lookups) == 3


def test_nothing_of_it_stays(tmp_path: Path) -> None:
    before = [*sys.meta_path]
    with kept_indexes(tmp_path):
        assert sys.meta_path != before
    assert sys.meta_path == before


class TestLateModule:
    @pytest.fixture
    def name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A package that nobody has imported."""
        (tmp_path / "late_example").mkdir()
        (tmp_path / "late_example" / "__init__.py").write_text("value = 7")
        (tmp_path / "late_example" / "part.py").write_text("value = 8")
        monkeypatch.syspath_prepend(tmp_path)
        for each in ("late_example", "late_example.part"):
            monkeypatch.setitem(sys.modules, each, None)  # to be put back at the end
            monkeypatch.delitem(sys.modules, each)
        return "late_example"

    def test_it_is_imported_when_it_is_used(self, name: str) -> None:
        with late_module(name):
            module = importlib.import_module(name)
        assert name not in sys.modules
        assert module.value == 7
        assert sys.modules[name] is not module

    def test_whoever_needs_it_at_once_gets_it(self, name: str) -> None:
        with late_module(name):
            importlib.import_module(name)
            assert importlib.import_module(f"{name}.part").value == 8
        assert importlib.import_module(name).value == 7

    def test_what_is_there_stays(self, name: str) -> None:
        module = importlib.import_module(name)
        with late_module(name):
            assert importlib.import_module(name) is module
        assert sys.modules[name] is module
