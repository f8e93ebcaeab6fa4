"""What makes a model another model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from engine.catalog.identity import Identity, identity_of
from engine.config import ModelConfig

COMMIT, NEXT = "a" * 40, "b" * 40


def model(source: object, options: Mapping[str, Any] | None = None, **more: Any) -> ModelConfig:
    own = {"id": "m", "source": str(source), "options": options or {}, **more}
    return ModelConfig.model_validate(own)


def identity(model: ModelConfig, cache_dir: Path) -> Identity:
    found = identity_of(model, cache_dir)
    assert identity_of(model, cache_dir) == found
    return found


def diffusers(folder: Path, loras: Path) -> ModelConfig:
    return model(folder, {"loras": str(loras)}, runtime="diffusers", task="image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_text("1234")
    return folder


def test_what_answers_do_not_depend_on(folder: Path, tmp_path: Path) -> None:
    plain = identity(model(folder), tmp_path)
    other: dict[str, Any] = {
        "aliases": ["n"],
        "pin": True,
        "keep_alive": 5,
        "max_wait": 1,
        "quality": 1,
    }
    assert identity(model(folder, **other), tmp_path) == plain
    os.utime(folder)  # as every load does
    assert identity(model(folder), tmp_path) == plain
    assert plain.complete


def test_the_configuration(folder: Path, tmp_path: Path) -> None:
    every = [
        model(folder),
        model(folder, id="n"),
        model(folder, task="embed"),
        model(folder, {"max_model_len": 64}),
        model(folder, {"seed": 1}),
        model(tmp_path / "elsewhere"),
    ]
    assert len({identity(each, tmp_path).digest for each in every}) == len(every)


@pytest.mark.parametrize("name", ["model_index.json", "unet/weights.safetensors", "unet/new.json"])
def test_a_file_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    before = identity(model(folder), tmp_path)
    path = folder / name
    path.write_text("12345")
    after = identity(model(folder), tmp_path)
    assert after.digest != before.digest
    assert after.changed_at == path.stat().st_ctime >= before.changed_at


def test_a_file_of_the_same_size(folder: Path, tmp_path: Path) -> None:
    path = folder / "unet" / "weights.safetensors"
    os.utime(path, ns=(0, 10**9))
    before = identity(model(folder), tmp_path)
    path.write_text("5678")
    os.utime(path, ns=(0, 2 * 10**9))
    after = identity(model(folder), tmp_path)
    assert after.digest != before.digest
    # A copy with an old time is new on this disk.
    assert after.changed_at == path.stat().st_ctime


def test_a_chat_template(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    configured = model(folder, {"chat_template": str(template)})
    digests = {identity(configured, tmp_path).digest}
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        digests.add(identity(configured, tmp_path).digest)
    assert len(digests) == 3


def test_loras(folder: Path, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    before = identity(diffusers(folder, loras), tmp_path)
    assert before.loras_changed_at == 0
    loras.mkdir()
    (loras / "style.safetensors").write_text("1")
    after = identity(diffusers(folder, loras), tmp_path)
    assert after.digest != before.digest
    assert after.changed_at == before.changed_at, "a loaded model is as new as it was"
    assert after.loras_changed_at == (loras / "style.safetensors").stat().st_ctime


def test_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    absent = identity(model("owner/name"), tmp_path)
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    found = []
    for commit in (COMMIT, NEXT):
        (repo / "refs" / "main").write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        blob = repo / "blobs" / f"blob-{commit}"
        blob.write_text(commit)
        (repo / "snapshots" / commit / "config.json").symlink_to(blob)
        found.append(identity(model("owner/name"), tmp_path))
        assert found[-1].changed_at > 0
    assert len({absent.digest, *(each.digest for each in found)}) == 3
    # Fetched once more it is the same model.
    blob = repo / "blobs" / f"blob-{NEXT}"
    os.utime(blob, ns=(0, 5))
    assert identity(model("owner/name"), tmp_path).digest == found[-1].digest
    pinned = model("owner/name", {"revision": COMMIT})
    before = identity(pinned, tmp_path)
    (repo / "refs" / "main").write_text(COMMIT)
    assert identity(pinned, tmp_path) == before


def test_a_model_that_is_not_built_yet(tmp_path: Path) -> None:
    starter = model("starter:tiny-llama")
    found = identity(starter, tmp_path)
    assert (found.changed_at, found.complete) == (0, False)
