"""The header of a GGUF file: its metadata, and where each tensor is.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is read here, and not by
the package `gguf`, because a broken file has to be refused in words that help.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from engine.errors import LoadFailed, reason
from engine.units import format_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The letter in `struct` of each type of a value with a fixed size."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file, not read yet."""

    name: str
    shape: tuple[int, ...]
    """As torch counts: the dimension that changes fastest is the last."""
    type_id: int
    """ggml's number of the number format."""
    offset: int
    """Bytes from the beginning of the data."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself before its weights."""

    file: Path
    nbytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """llama.cpp's word for the kind of model, such as `llama` or `qwen2`."""
        return str(self.metadata.get("general.architecture") or "")

    @property
    def tensor_names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(each.name for each in self.tensors)

    def of_model(self, key: str, default: Any = None) -> Any:
        """A value of the model's shape; its key begins with the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def of_tokenizer(self, key: str, default: Any = None) -> Any:
        """A value of the tokenizer."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)


def read_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        LoadFailed: it cannot be read, is no GGUF file, or ends too early.

    """
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
            if magic != MAGIC:
                raise LoadFailed(
                    f"{file.name} is no GGUF file. A folder or a repository of the hub can be"
                    " added too"
                )
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(file, data)
    except OSError as error:
        raise LoadFailed(f"{file} cannot be read: {reason(error)}") from error


def _parse(file: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, len(MAGIC), file.name)
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " or one for a big-endian machine" if version > 0xFFFF else ""
        raise LoadFailed(
            f"{file.name} is GGUF version {version}{order}; versions 2 and 3 are read. Convert the"
            " model again with a newer llama.cpp"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = tuple(_tensor(cursor) for _ in range(tensor_count))
    alignment = metadata.get("general.alignment") or DEFAULT_ALIGNMENT
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(file, len(data), metadata, tensors, data_start)


def _tensor(cursor: _Cursor) -> Tensor:
    name = cursor.string()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
    return Tensor(name, shape, cursor.number("I"), cursor.number("Q"))


class _Cursor:
    """Reads one value after the other, never past the end."""

    def __init__(self, data: mmap.mmap, position: int, name: str) -> None:
        self._data = data
        self._name = name
        self.position = position

    def number(self, letter: str) -> int:
        return int(struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0])

    def string(self) -> str:
        return self._take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self._array(_FIXED[kind], 1)[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise LoadFailed(f"{self._name} is damaged: its header has a value of type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _FIXED:
            return self._array(_FIXED[kind], count)
        return [self.value(kind) for _ in range(count)]

    def _array(self, letter: str, count: int) -> list[Any]:
        taken = self._take(count * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{count}{letter}", taken))

    def _take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > len(self._data):
            raise LoadFailed(
                f"{self._name} ends within its header, after {format_size(len(self._data))}: the"
                " download broke off. Fetch it again"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken
