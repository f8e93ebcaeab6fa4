"""Where a model's files are, and what is remembered of a folder while it stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import model_folder
from engine.catalog.model_files import remove
from engine.errors import LoadFailed
from engine.files.hub.fetch import fetch
from engine.files.hub.selection import HubSource
from engine.files.source import Source, starter_source
from engine.model_folder import (
    WANTED_FILES,
    Builder,
    PresentFolders,
    is_built_here,
    local_folder,
    present_folder,
)
from tests.hub import Hub, point_client_at, serving


class Reads:
    """Folders of `config.json`, and how often one was read."""

    def __init__(self, cache_dir: Path) -> None:
        self.count = 0
        self.folders = PresentFolders(cache_dir, self._read, ["config.json"])

    def _read(self, folder: Path) -> Any:
        self.count += 1
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def reads(tmp_path: Path) -> Reads:
    return Reads(tmp_path / "cache")


def write(folder: Path, **config: Any) -> None:
    """Put another file in the place of `config.json`, as downloads and editors do."""
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(config), encoding="utf-8")
    unfinished.replace(folder / "config.json")


class TestLocalFolders:
    def test_gguf_alone_is_named(self, tmp_path: Path) -> None:
        folder = tmp_path / "gguf"
        folder.mkdir()
        for name in ("model-Q4_K_M.gguf", "README.md", "config.json"):
            (folder / name).write_bytes(b"x")
        with pytest.raises(
            LoadFailed,
            match=r"gguf holds only GGUF weights.*roundhouse add FILE.*safetensors",
        ) as caught:
            local_folder(str(folder), tmp_path)
        assert str(tmp_path) not in caught.value.message
        (folder / "model.safetensors").write_bytes(b"x")
        assert local_folder(str(folder), tmp_path) == folder

    def test_a_missing_folder_is_named_without_its_place(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        missing = tmp_path / "nowhere"
        with pytest.raises(LoadFailed, match="there is no folder nowhere") as caught:
            local_folder(str(missing), tmp_path)
        assert str(tmp_path) not in caught.value.message
        assert str(missing) in caplog.text


class TestPresentFolders:
    def test_a_folder_is_read_once(self, reads: Reads, folder: Path) -> None:
        write(folder, width=1)
        for _ in range(3):
            assert reads.folders.get(str(folder)) == {"width": 1}
        local_folder(str(folder), folder)  # as every load does
        assert reads.folders.get(str(folder)) == {"width": 1}
        assert reads.count == 1

    def test_none_while_it_is_not_here(self, reads: Reads, folder: Path) -> None:
        assert reads.folders.get(str(folder / "nowhere")) is None
        assert reads.folders.get("me/nothing") is None
        assert reads.folders.get("starter:tiny-llama") is None
        assert reads.count == 0

    def test_a_delete_is_noticed_and_so_is_what_comes_after(
        self, reads: Reads, folder: Path
    ) -> None:
        write(folder, width=1)
        assert reads.folders.get(str(folder)) == {"width": 1}
        shutil.rmtree(folder)
        assert reads.folders.get(str(folder)) is None
        folder.mkdir()
        write(folder, width=1)
        assert reads.folders.get(str(folder)) == {"width": 1}
        assert reads.count == 2

    def test_another_file_in_its_place_is_read(self, reads: Reads, folder: Path) -> None:
        write(folder, width=1)
        assert reads.folders.get(str(folder)) == {"width": 1}
        write(folder, width=2)
        assert reads.folders.get(str(folder)) == {"width": 2}

    def test_a_failure_is_not_remembered(self, reads: Reads, folder: Path) -> None:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                reads.folders.get(str(folder))
        write(folder, width=1)
        assert reads.folders.get(str(folder)) == {"width": 1}

    def test_a_pull_and_a_delete_in_the_cache_of_the_hub(
        self, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = HubSource("me/tiny", WANTED_FILES)
        with serving(Hub()) as hub:
            point_client_at(hub, tmp_path, monkeypatch)
            hub.repos["me/tiny"] = {"config.json": b'{"width": 1}', "model.safetensors": b"x"}
            assert reads.folders.get("me/tiny") is None
            fetch(source)
            assert reads.folders.get("me/tiny") == {"width": 1}
            hub.repos["me/tiny"] = {"config.json": b'{"width": 2}', "model.safetensors": b"x"}
            fetch(source)
            assert reads.folders.get("me/tiny") == {"width": 2}
            remove("me/tiny")
            assert reads.folders.get("me/tiny") is None
            fetch(source)
            assert reads.folders.get("me/tiny") == {"width": 2}
        assert reads.count == 3

    def test_each_revision_is_a_folder_of_its_own(
        self, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serving(Hub()) as hub:
            point_client_at(hub, tmp_path, monkeypatch)
            hub.repos["me/tiny"] = {"config.json": b"{}", "model.safetensors": b"x"}
            fetch(HubSource("me/tiny", WANTED_FILES))
            commit = hub.commit("me/tiny")
        assert reads.folders.get("me/tiny", commit) == {}
        assert reads.folders.get("me/tiny", "0" * 40) is None


@pytest.mark.parametrize(
    ("text", "scheme", "name", "is_path", "is_repo"),
    [
        ("starter:tiny-llama", "starter", "tiny-llama", False, False),
        ("samples:beach", "samples", "beach", False, False),
        ("me/tiny", None, "", False, True),
        ("tiny", None, "", False, True),
        ("/models/tiny", None, "", True, False),
        ("~/tiny", None, "", True, False),
        ("./me/tiny", None, "", True, False),
        ("me/tiny/deep", None, "", False, False),
    ],
)
def test_a_source_taken_apart(
    text: str, scheme: str | None, name: str, is_path: bool, is_repo: bool
) -> None:
    source = Source(text)
    assert (source.scheme, source.name) == (scheme, name)
    assert (source.is_path, source.is_repo) == (is_path, is_repo)


def test_a_relative_folder_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source("me/tiny").is_repo
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    assert not Source("me/tiny").is_repo
    assert local_folder("me/tiny", tmp_path) == Path("me/tiny")


def test_a_starter_model_that_does_not_exist(tmp_path: Path) -> None:
    assert Source(starter_source("nope")).name == "nope"
    with pytest.raises(LoadFailed, match=r"starter:nope: no such starter model"):
        local_folder(starter_source("nope"), tmp_path)


def test_a_further_scheme_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, cache_dir: Path) -> Path:
        return cache_dir / "tracks" / name

    def build(name: str, cache_dir: Path) -> Path:
        folder(name, cache_dir).mkdir(parents=True)
        return folder(name, cache_dir)

    assert not is_built_here("tracks:beach")
    monkeypatch.setattr(
        model_folder, "BUILDERS", {**model_folder.BUILDERS, "tracks": Builder(build, folder)}
    )
    assert is_built_here("tracks:beach") and is_built_here("starter:tiny-llama")
    assert present_folder("tracks:beach", tmp_path) is None
    assert local_folder("tracks:beach", tmp_path) == tmp_path / "tracks" / "beach"
    assert present_folder("tracks:beach", tmp_path) == tmp_path / "tracks" / "beach"
