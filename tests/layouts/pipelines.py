"""The published repositories of image and video models, and folders built after them.

A file of `pipelines/` describes one repository:

- `repository`, `licence`, `gated`, `sources`: what each fact was taken from;
- `index`: `model_index.json`;
- `parts`: for each folder, what it holds: `is` names a file of `parts/`, with the configuration and
  the tensors. `more` are tensors that the file has beside them, and that nothing needs. `files` are
  its sets of weights, each with its dtype, its size in GB (10^9 bytes) as the hub shows it, its
  number of shards, and its variant;
- `small`: files without weights that are fetched; `left`: files that must not be fetched;
- `skipped`: parts that a pipeline class does not take;
- `entry`: what `roundhouse add` writes for it, less the source; null for a part of other models.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from engine.config import ModelConfig
from engine.runtimes.diffusers.options import DiffusersOptions
from tests.layouts.layout import Layout, WeightSet
from tests.layouts.names import expand
from tests.layouts.sparse import Tensor, Tensors

HERE = Path(__file__).parent
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SMALL_BYTES = 1000
"""The size of a file that nobody reads here."""


@dataclass(frozen=True)
class Part:
    """A folder of weights."""

    name: str
    config: Mapping[str, Any]
    tensors: Tensors
    more: Tensors
    files: tuple[Mapping[str, Any], ...]

    @property
    def folder(self) -> str:
        """As paths begin."""
        return f"{self.name}/" if self.name else ""

    def weights(self, given: Mapping[str, Any], dtype: str | None = None) -> WeightSet:
        """One of its sets of weights, as stored or in another dtype."""
        tensors = {
            name: replace(tensor, dtype=dtype or given["dtype"])
            for name, tensor in self.tensors.items()
        }
        counts = {name: each for name, each in tensors.items() if name.endswith("batches_tracked")}
        integers = {
            name: replace(each, dtype="I64") for name, each in [*counts.items(), *self.more.items()]
        }
        return WeightSet(
            self.folder + given["file"],
            given.get("shards", 1),
            {**tensors, **integers},
            frozenset(self.more),
            None,
        )


class PipelineLayout(Layout):
    """One repository, of a pipeline or of a part."""

    def __init__(self, path: Path) -> None:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.repository = raw["repository"]
        self.licence = raw["licence"]
        self.gated: bool = raw["gated"]
        self.entry = raw["entry"]
        self.parts = tuple(_part(name, given) for name, given in raw["parts"].items())
        self.skipped: Mapping[str, list[str]] = raw.get("skipped", {})
        self.published = {}
        self.texts = {}
        self.beside = {}
        self.left = frozenset(name for each in raw["left"] for name in expand(each))
        small = [name for each in raw["small"] for name in expand(each)]
        self.files = dict.fromkeys([*small, *self.left, "README.md"], SMALL_BYTES)
        self.documents = {f"{part.folder}config.json": part.config for part in self.parts}
        if "index" in raw:
            self.documents["model_index.json"] = raw["index"]
        self.sets = tuple(part.weights(each) for part in self.parts for each in part.files)

    def used(self, options: DiffusersOptions) -> tuple[Part, ...]:
        """The parts that a model takes."""
        without = {*self.skipped.get(options.pipeline or "", ()), *options.components}
        return tuple(part for part in self.parts if part.name not in without)

    def chosen(self, part: Part, variant: str | None) -> Mapping[str, Any]:
        """The set of weights that a model with that variant takes."""
        return next(each for each in part.files if each.get("variant") == variant)

    def wanted(self, model: ModelConfig) -> frozenset[str]:
        """The files that a model needs."""
        options = model.options_as(DiffusersOptions)
        variant = options.variant if "model_index.json" in self.documents else None
        paths = {*self.files, *self.documents} - self.left - {"README.md"}
        for part in self.parts:
            for each in part.files:
                if part.weights(each).index is not None:
                    paths.add(f"{part.folder}{each['file']}.index.json")
        for part in self.used(options):
            paths.update(part.weights(self.chosen(part, variant)).parts)
        return frozenset(paths)

    def as_loaded(self, model: ModelConfig) -> PipelineLayout:
        """The same repository with its weights in the dtype of the model: none is converted."""
        options = model.options_as(DiffusersOptions)
        variant = options.variant if "model_index.json" in self.documents else None
        made = copy(self)
        vars(made).pop("sizes", None)
        made.sets = tuple(
            part.weights(
                self.chosen(part, variant),
                STORED[(options.vae_dtype if part.name == "vae" else None) or options.dtype],
            )
            for part in self.used(options)
        )
        return made


@cache
def pipeline_layouts() -> dict[str, PipelineLayout]:
    """Every described repository by its name."""
    found = [PipelineLayout(path) for path in sorted((HERE / "pipelines").glob("*.yaml"))]
    return {each.repository: each for each in found}


def _part(name: str, given: Mapping[str, Any]) -> Part:
    raw = yaml.safe_load((HERE / "parts" / f"{given['is']}.yaml").read_text(encoding="utf-8"))
    config = {**raw["config"], **given.get("config", {})}
    tensors = _tensors(raw["tensors"])
    return Part(name, config, tensors, _tensors(given.get("more", {})), tuple(given["files"]))


def _tensors(patterns: Mapping[str, list[int]]) -> Tensors:
    found = {}
    for pattern, shape in patterns.items():
        for name in expand(pattern):
            assert name not in found, f"{name} is described twice"
            found[name] = Tensor("F32", tuple(shape))
    return found
