"""A new runtime is a package and one line of the registry; everything else asks it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from engine.catalog import loras
from engine.catalog.downloads import sources_of
from engine.catalog.model_files import files_of
from engine.config import EngineConfig, engine_config
from engine.engine import Engine
from engine.errors import ConfigError, InvalidRequest
from engine.events import Document
from engine.files.hub.selection import HubSource
from engine.requests import TextOperation, TextRequest
from engine.runtimes.registry import REGISTRY, RUNTIMES
from server.commands import cli, terminal
from tests.engine.runtimes.toy import ToyOptions, ToyRuntime
from tests.hub import Hub, point_client_at, serving
from tests.server.fake import FakeDevice

REPO = "me/rhymer"
FILES = {"rhymes.json": b'{"moon": "june", "day": "may"}', "words.npz": b"words", "notes.txt": b""}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(REGISTRY, "toy", "tests.engine.runtimes.toy:ToyRuntime")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.repos[REPO] = dict(FILES)
        point_client_at(hub, tmp_path, monkeypatch)
        yield hub


def read(tmp_path: Path, **options: Any) -> EngineConfig:
    model = {"id": "rhymer", "runtime": "toy", "task": "rhyme", "source": REPO, "options": options}
    engine = {name: str(tmp_path / name) for name in ("cache_dir", "state_dir", "data_dir")}
    return engine_config({"engine": {"memory": 1000, **engine}, "models": [model]}, RUNTIMES)


def test_it_is_configured(tmp_path: Path) -> None:
    (model,) = read(tmp_path, lines=3).models
    assert model.task == "rhyme"
    assert model.options_as(ToyOptions) == ToyOptions(lines=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"line": 1}, "models[0].options.line: unknown key (did you mean lines?)"),
        ({"lines": 0}, "models[0].options.lines: it must be at least 1"),
    ],
)
def test_its_options_are_checked(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, **options)
    assert raised.value.message.startswith(told)


def test_it_is_among_the_runtimes_and_its_task_among_the_tasks() -> None:
    with pytest.raises(ConfigError, match=r"no runtime 'toi'; there is bark, .*, toy, vllm"):
        engine_config({"models": [{"id": "a", "runtime": "toi", "source": "x"}]}, RUNTIMES)
    with pytest.raises(ConfigError, match=r"task: it must be .* or 'rhyme'"):
        engine_config({"models": [{"id": "a", "task": "rime", "source": "x"}]}, RUNTIMES)


def test_what_it_fetches_is_listed(tmp_path: Path, hub: Hub) -> None:
    config = read(tmp_path, dictionary="me/words")
    own = HubSource(REPO, ("rhymes.json", "*.npz"))
    assert sources_of(config.models[0]) == (own, HubSource("me/words", ("*.npz",)))
    assert [files.source for files in files_of(config.models[0], config)] == [REPO, "me/words"]


class TestCommands:
    @pytest.fixture
    def path(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(terminal.out, "width", 250)
        path = tmp_path / "config.yaml"
        monkeypatch.setenv("ROUNDHOUSE_CONFIG", str(path))
        return path

    def invoke(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli.app, arguments)

    def test_a_repository_is_recognised_and_pulled(self, path: Path) -> None:
        added = self.invoke("add", REPO)
        assert added.exit_code == 0, added.output
        assert yaml.safe_load(path.read_text())["models"] == [
            {
                "id": "rhymer",
                "runtime": "toy",
                "task": "rhyme",
                "source": REPO,
                "options": {"lines": 2},
            }
        ]
        pulled = self.invoke("pull", "rhymer")
        assert pulled.exit_code == 0, pulled.output
        listed = self.invoke("ls")
        assert listed.exit_code == 0, listed.output
        row = next(line for line in listed.stdout.splitlines() if "rhymer" in line)
        assert " yes " in row

    def test_only_what_it_reads_is_fetched(self, path: Path, tmp_path: Path) -> None:
        assert self.invoke("add", REPO, "--pull").exit_code == 0
        (folder,) = (tmp_path / "hub").glob("models--*/snapshots/*")
        assert {each.name for each in folder.iterdir()} == {"rhymes.json", "words.npz"}


def test_loras_go_where_it_says(tmp_path: Path) -> None:
    (model,) = read(tmp_path, loras=str(tmp_path / "loras")).models
    data = save({"unet.lora_A.weight": np.zeros((1, 1), np.float32)})
    assert loras.add(model, "style", BytesIO(data), cache_dir=tmp_path) == len(data)
    assert (tmp_path / "loras" / "style.safetensors").read_bytes() == data
    with pytest.raises(InvalidRequest, match="no folder of LoRAs"):
        loras.folder_of(read(tmp_path).models[0])


async def test_it_serves(tmp_path: Path, hub: Hub) -> None:
    engine = Engine(read(tmp_path), device=FakeDevice())
    await engine.start()
    try:
        runtime = engine._runtimes["toy"]
        assert isinstance(runtime, ToyRuntime) and runtime.started
        assert (runtime.context.cache_dir, runtime.context.budget_bytes) == (
            tmp_path / "cache_dir",
            1000,
        )
        assert runtime.context.host is not None
        body = {"prompt": "moon"}
        session = await engine.open(TextRequest("rhymer", TextOperation.COMPLETION, body, "a"))
        (document,) = [event async for event in session.events()]
        assert isinstance(document, Document)
        assert json.loads(document.body) == ["june", "june"]
        with pytest.raises(InvalidRequest, match="Nothing rhymes with 'orange'"):
            engine.prepare(
                TextRequest("rhymer", TextOperation.COMPLETION, {"prompt": "orange"}, "b")
            )
    finally:
        await engine.stop()


async def test_a_configuration_that_nobody_checked_is_checked_at_the_start(
    tmp_path: Path,
) -> None:
    raw = {"id": "rhymer", "runtime": "toy", "source": REPO, "options": {"line": 1}}
    config = EngineConfig.model_validate({"models": [raw], "state_dir": tmp_path})
    engine = Engine(config, device=FakeDevice())
    with pytest.raises(ConfigError, match=r"models\[rhymer\]\.options\.line: unknown key"):
        await engine.start()
    await engine.stop()
