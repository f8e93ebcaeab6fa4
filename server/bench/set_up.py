"""What all targets of a measurement share: models, their files and settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import EngineConfig, ModelConfig
from engine.errors import ModelNotFound
from engine.runtimes.registry import runtime_class
from server.bench.errors import BadSetUp, NotStarted

ROOT = Path(__file__).resolve().parents[2]

_FETCH = """
import sys
from pathlib import Path
from engine.files.hub.cache import present
from engine.files.hub.fetch import fetch
from engine.files.hub.selection import HubSource
from engine.files.source import Source
from engine.model_folder import WANTED_FILES, local_folder
for source in sys.argv[2:]:
    wanted = HubSource(source, WANTED_FILES)
    if Source(source).is_repo and not present(wanted):
        fetch(wanted)
    print(local_folder(source, Path(sys.argv[1])))
"""


@dataclass(frozen=True, slots=True)
class SetUp:
    """The shared models and settings, and a folder for their configuration."""

    folder: Path
    models: tuple[ModelConfig, ...]
    model_folders: tuple[Path, ...]
    """Where the files of each model are."""
    environment: Mapping[str, str]
    """Variables for every target, on top of this process's environment."""
    on_gpu: bool
    memory: str | None = None
    """The memory budget of our server. None takes the server's default."""

    @property
    def config_path(self) -> Path:
        """The configuration of our server and of the bare library."""
        return self.folder / "roundhouse.yaml"

    def write(self) -> None:
        """Write the configuration."""
        engine: dict[str, Any] = {
            "device": "cuda" if self.on_gpu else "cpu",
            "cache_dir": str(self.folder / "cache"),
            "state_dir": str(self.folder / "state"),
            "data_dir": str(self.folder / "data"),
        }
        if self.memory is not None:
            engine["memory"] = self.memory
        models = [
            model.model_dump(mode="json", exclude_unset=True, exclude={"aliases"})
            for model in self.models
        ]
        document = {"engine": engine, "models": models}
        self.config_path.write_text(yaml.safe_dump(document), encoding="utf-8")


def read_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of a model from `KEY=VALUE`, with values as in YAML.

    Raises:
        BadSetUp: a pair does not have that form.

    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise BadSetUp(f"--set {pair}: write KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


def choose_models(
    config: EngineConfig, names: Sequence[str], overrides: Mapping[str, Any]
) -> tuple[ModelConfig, ...]:
    """The named models. `overrides` go before the options of each.

    Raises:
        BadSetUp: there is no such model, or it has no such option.

    """
    chosen = []
    for name in names:
        try:
            model = config.find(name)
        except ModelNotFound as error:
            raise BadSetUp(error.message) from error
        options = {**model.options, **overrides}
        try:
            runtime_class(model.runtime).Options.model_validate(options)
        except ValueError as error:
            raise BadSetUp(f"--set: {error}") from error
        chosen.append(model.model_copy(update={"options": options}))
    return tuple(chosen)


def fetch(models: Sequence[ModelConfig], cache_dir: Path) -> tuple[Path, ...]:
    """The folders of the models' files. A process of its own gets them: some builds import torch.

    Raises:
        NotStarted: a model is not available.

    """
    done = subprocess.run(
        [sys.executable, "-c", _FETCH, str(cache_dir), *(model.source for model in models)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotStarted(f"cannot fetch the models: {done.stderr.strip().splitlines()[-1]}")
    return tuple(map(Path, done.stdout.splitlines()[-len(models) :]))
