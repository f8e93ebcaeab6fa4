"""`roundhouse add FILE.gguf`, with a conversion that copies a starter model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from engine.config import ENV_CONFIG
from engine.conversion import gguf
from engine.errors import LoadFailed
from engine.starters.registry import ensure_starter
from server.commands import cli, terminal
from tests.engine.conversion.test_refusals import written


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.yaml"
    model = "{id: other, source: starter:tiny-qwen}"
    path.write_text(f"engine:\n  cache_dir: {tmp_path / 'cache'}\nmodels:\n  - {model}\n")
    monkeypatch.setattr(terminal.out, "width", 250)
    monkeypatch.setenv(ENV_CONFIG, str(path))
    return path


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted."""
    done: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        done.append(file)
        starter = ensure_starter("tiny-llama", tmp_path / "starters")
        shutil.copytree(starter, folder, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    monkeypatch.setattr(gguf, "check_answers", lambda file, folder: None)
    return done


def add(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["add", *arguments])


def models(config: Path) -> list[dict[str, Any]]:
    """Those that were added."""
    found: list[dict[str, Any]] = yaml.safe_load(config.read_text())["models"]
    return [model for model in found if model["id"] != "other"]


def test_the_folder_is_in_the_cache_and_the_entry_names_it(
    config: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    file = written(tmp_path, "My Llama.Q4_K_M.gguf")
    result = add(str(file))
    assert result.exit_code == 0, result.output
    (entry,) = models(config)
    assert entry["id"] == "my-llama.q4_k_m"
    assert Path(entry["source"]).is_relative_to(tmp_path / "cache" / "gguf")
    assert Path(entry["source"], "model.safetensors").is_file()
    assert "converting it to" in result.stderr
    assert "no chat template" not in result.stderr
    assert "vllm, generate" in result.output


def test_the_same_file_again_is_not_converted_again(
    config: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    # As Ollama names its files: by a hash, without a suffix.
    named: dict[str, Any] = {"general.name": "Tiny Llama 3"}
    file = written(tmp_path, "sha256-0123", **named)
    assert "converted before" not in add(str(file)).stderr
    assert "converted before" in add(str(file)).stderr
    first, second = models(config)
    assert first["id"] == "tiny-llama-3"
    assert second == {**first, "id": "tiny-llama-3-2"}
    assert conversions == [file]


def test_a_new_configuration(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config = tmp_path / "new.yaml"
    result = add(str(written(tmp_path)), "--config", str(config))
    assert result.exit_code == 0, result.output
    assert Path(models(config)[0]["source"]).is_relative_to(tmp_path / "home")


def test_a_model_without_a_chat_template_is_told(
    config: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "has_chat_template", lambda folder: False)
    result = add(str(written(tmp_path)), "--id", "mine")
    assert result.exit_code == 0
    assert models(config)[0]["id"] == "mine"
    assert "has no chat template" in result.stderr


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("model.gguf", b"PK", "model.gguf is no GGUF file"),
        ("model.safetensors", b"PK", "model.safetensors is no GGUF file"),
        ("none.gguf", None, "none.gguf cannot be read"),
    ],
)
def test_another_file(
    config: Path,
    tmp_path: Path,
    conversions: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: bytes | None,
    told: str,
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    before = config.read_text()
    result = add(name)
    assert result.exit_code == 1
    assert told in result.stderr
    assert config.read_text() == before
    assert not conversions


def test_a_conversion_that_fails_adds_nothing(
    config: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, folder: Path) -> None:
        raise LoadFailed("it answers differently")

    monkeypatch.setattr(gguf, "check_answers", refuse)
    before = config.read_text()
    result = add(str(written(tmp_path)))
    assert result.exit_code == 1
    assert "it answers differently" in result.stderr
    assert config.read_text() == before
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
