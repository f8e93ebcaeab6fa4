"""Which files of a repository are wanted: by patterns, and each set of weights once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".gguf", ".onnx")
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
"""Fetched instead of safetensors, and only if that was allowed."""

GGUF = (
    "Convert one of them with `roundhouse add FILE.gguf`, or take the repository that they were"
    " made from, with config.json and .safetensors files"
)

_VARIANT = re.compile(
    r"(?P<base>.+?)\.(?:fp16|fp32|bf16|fp8\w*|int8|ema|non_ema)(?P<shard>-\d+-of-\d+)?\.safetensors"
)
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository, and which of its files are wanted."""

    repo: str
    """`owner/name`."""
    patterns: tuple[str, ...]
    """As in a shell, but `*` matches a slash. What begins with `!` names files to leave out."""
    revision: str | None = None
    allow_pickle: bool = False
    """Take pickled weights if there are no others."""


def has_only_gguf(paths: Iterable[str]) -> bool:
    """Whether the only weights among these files are GGUF, which no runtime reads."""
    weights = [path for path in paths if path.endswith(WEIGHTS)]
    return bool(weights) and all(path.endswith(".gguf") for path in weights)


def choose(paths: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match, without the weights that a repository holds once more.

    Left out are: a variant (`*.fp16.safetensors`) if the plain file is wanted too; Mistral's
    `consolidated` beside `model`; copies in folders for other programs (`original/`, `metal/`) if
    the weights are at the root. Folders that begin with a digit are layers of a sentence embedder,
    and stay.
    """
    unwanted = [each[1:] for each in patterns if each.startswith("!")]
    matching = [
        path
        for path in paths
        if any(fnmatchcase(path, each) for each in patterns)
        and not any(fnmatchcase(path, each) for each in unwanted)
    ]
    weights = {path for path in matching if path.endswith(".safetensors")}
    plain = {
        (str(PurePosixPath(path).parent), _SHARD.sub("", PurePosixPath(path).stem))
        for path in weights
    }
    at_root = (".", "model") in plain

    def is_copy(path: str) -> bool:
        parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        variant = _VARIANT.fullmatch(name)
        if variant is not None and (parent, variant["base"]) in plain:
            return True
        if name.startswith("consolidated") and (parent, "model") in plain:
            return True
        return at_root and parent != "." and not parent[0].isdigit()

    return [path for path in matching if path not in weights or not is_copy(path)]
