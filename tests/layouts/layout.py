"""What a published repository holds, read from `data/`, and a folder built after it.

A file of `data/` describes one repository:

- `repository`, `licence`, and `sources`: what each fact was taken from;
- `published`: the figures that the tensors below must add up to;
- `entry`: what `roundhouse add` writes for it, less the source; null for a part of other models;
- `documents`: JSON files with their contents, as far as anything here reads them;
- `texts`: other small texts with theirs;
- `files`: other files with their sizes, 0 where nobody said;
- `left`: files that must not be fetched;
- `weights`: sets of tensors, each in a file or in shards with an index beside them. `unused` are
  tensors of the file that the loaded model does without.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from engine.config import ModelConfig
from engine.files.hub.listing import Listing, RemoteFile
from engine.files.hub.selection import HubSource
from tests.layouts.names import expand
from tests.layouts.sparse import (
    Tensor,
    Tensors,
    safetensors_header,
    write_ctranslate2,
    write_hole,
    write_safetensors,
)

DATA = Path(__file__).parent / "data"

TOLERANCE = 0.02
"""How far an estimate may be from what is published."""


@dataclass(frozen=True)
class WeightSet:
    """Tensors that belong together: a file, or shards and their index."""

    file: str
    shards: int
    tensors: Tensors
    unused: frozenset[str]
    nbytes: int | None
    """The published size of the one file, where it is known and not that of safetensors."""

    @property
    def format(self) -> str:
        """How its files are written."""
        if self.file.endswith(".safetensors"):
            return "safetensors"
        return "ctranslate2" if self.file == "model.bin" else "pickle"

    @cached_property
    def parts(self) -> dict[str, Tensors]:
        """The tensors of each file, in order, some equal bytes to each shard."""
        if self.shards == 1:
            return {self.file: self.tensors}
        stem, _, suffix = self.file.rpartition(".")
        share = sum(each.nbytes for each in self.tensors.values()) / self.shards
        parts: dict[str, dict[str, Tensor]] = {
            f"{stem}-{number:05d}-of-{self.shards:05d}.{suffix}": {}
            for number in range(1, self.shards + 1)
        }
        files = list(parts)
        before = 0
        for name, tensor in self.tensors.items():
            parts[files[min(int(before / share), self.shards - 1)]][name] = tensor
            before += tensor.nbytes
        return dict(parts)

    @property
    def index(self) -> tuple[str, dict[str, Any]] | None:
        """The path and the contents of the index, if there are shards."""
        if self.shards == 1:
            return None
        total = sum(each.nbytes for each in self.tensors.values())
        # An index names its shards as they lie beside it.
        where = {
            name: file.rpartition("/")[2] for file, names in self.parts.items() for name in names
        }
        document = {"metadata": {"total_size": total}, "weight_map": where}
        return f"{self.file}.index.json", document


class Layout:
    """One repository."""

    def __init__(self, path: Path) -> None:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.repository: str = raw["repository"]
        self.licence: str = raw["licence"]
        self.published: dict[str, int] = raw["published"]
        self.entry: dict[str, Any] | None = raw["entry"]
        self.documents: dict[str, Any] = raw.get("documents", {})
        self.texts: dict[str, str] = raw.get("texts", {})
        self.files = {
            name: size for pattern, size in raw.get("files", {}).items() for name in expand(pattern)
        }
        self.left = frozenset(name for each in raw.get("left", ()) for name in expand(each))
        self.beside: dict[str, Any] = raw.get("beside", {})
        """What a pickled checkpoint holds beside its tensors."""
        self.sets = tuple(_weight_set(each) for each in raw["weights"])

    def model(self, source: str, **options: Any) -> ModelConfig:
        """The entry that is added, for these files and with more options."""
        entry = self.entry or {}
        merged = {**entry.get("options", {}), **options}
        return ModelConfig(**{**entry, "id": "new", "source": source, "options": merged})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of every set that is fetched."""
        for each in self.sets:
            if not self.left.intersection(each.parts):
                yield from each.tensors.items()

    def loaded(self) -> dict[str, Tensor]:
        """The tensors that the loaded model keeps."""
        unused = {name for each in self.sets for name in each.unused}
        return {name: tensor for name, tensor in self.tensors() if name not in unused}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Every file of the repository and its size."""
        sizes = dict(self.files)
        for path, text in self._texts().items():
            sizes[path] = len(text.encode())
        for each in self.sets:
            for path, tensors in each.parts.items():
                head = safetensors_header(tensors) if each.format == "safetensors" else b""
                nbytes = sum(tensor.nbytes for tensor in tensors.values())
                sizes[path] = each.nbytes or len(head) + nbytes
        return sizes

    def listing(self, folder: Path | None = None) -> Listing:
        """What the hub lists. Documents are read in `folder`, where the layout was built."""
        files = tuple(RemoteFile(path, size, "") for path, size in sorted(self.sizes.items()))
        return Listing(self.repository, "main", "0" * 40, files, folder)

    def fetched(self, source: HubSource) -> frozenset[str]:
        """The files that would be fetched."""
        return frozenset(file.path for file in self.listing().choose(source))

    def build(self, folder: Path, only: Collection[str] | None = None) -> Path:
        """Write the repository, or some of its files, into a folder; takes no room on the disk."""
        wanted = self.sizes.keys() if only is None else only
        folder.mkdir(parents=True, exist_ok=True)
        for path, size in self.files.items():
            if path in wanted:
                write_hole(folder / path, size)
        for path, text in self._texts().items():
            if path in wanted:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
        for each in self.sets:
            for path, tensors in each.parts.items():
                if path in wanted:
                    self._write(folder / path, tensors, each.format)
        return folder

    def shallow(self, layers: int, unit: str = "model.layers.") -> Layout:
        """The same with the first layers only, as thousands of experts take long to compare."""
        cut = copy(self)
        vars(cut).pop("sizes", None)
        config = {**self.documents["config.json"], "num_hidden_layers": layers}
        cut.documents = {**self.documents, "config.json": config}
        cut.sets = tuple(
            replace(
                each,
                tensors={
                    name: tensor
                    for name, tensor in each.tensors.items()
                    if not name.startswith(unit)
                    or int(name.removeprefix(unit).partition(".")[0]) < layers
                },
            )
            for each in self.sets
        )
        return cut

    def _write(self, path: Path, tensors: Tensors, kind: str) -> None:
        if kind == "safetensors":
            write_safetensors(path, tensors)
        elif kind == "ctranslate2":
            write_ctranslate2(path, tensors, **self.beside)
        else:
            from tests.layouts.pickles import write_pickle  # it imports torch

            write_pickle(path, tensors, self.beside)

    def _texts(self) -> dict[str, str]:
        indexes = [each.index for each in self.sets if each.index is not None]
        documents = self.documents | dict(indexes)
        return self.texts | {path: json.dumps(each) for path, each in documents.items()}


@cache
def layouts() -> dict[str, Layout]:
    """Every described repository by its name."""
    found = [Layout(path) for path in sorted(DATA.glob("*.yaml"))]
    return {each.repository: each for each in found}


def _weight_set(raw: dict[str, Any]) -> WeightSet:
    tensors = {}
    for pattern, given in raw["tensors"].items():
        own = given if isinstance(given, dict) else {"shape": given}
        tensor = Tensor(own.get("dtype", raw["dtype"]), tuple(own["shape"]))
        for name in expand(pattern):
            assert name not in tensors, f"{name} is described twice"
            tensors[name] = tensor
    unused = {name for each in raw.get("unused", ()) for name in expand(each)}
    assert unused <= tensors.keys(), unused - tensors.keys()
    return WeightSet(
        raw["file"], raw.get("shards", 1), tensors, frozenset(unused), raw.get("nbytes")
    )
