"""Checkpoints of real size that take no disk: true headers, and a hole where the weights are."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from engine.files.ctranslate2_file import BINARY_VERSION, TYPES
from engine.files.ctranslate2_file import ITEM_BYTES as CTRANSLATE2_BYTES
from engine.files.safetensors_header import ITEM_BYTES


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a file says of one tensor."""

    dtype: str
    """As the format of the file writes it."""
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.count * (ITEM_BYTES | CTRANSLATE2_BYTES)[self.dtype]


Tensors = Mapping[str, Tensor]


def safetensors_header(tensors: Tensors) -> bytes:
    """The beginning of a safetensors file: the header's length, then the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def write_hole(path: Path, nbytes: int, head: bytes = b"") -> None:
    """Write a file that begins with `head` and reads as zeros from there on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(nbytes, len(head)))


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file whose weights are a hole."""
    head = safetensors_header(tensors)
    write_hole(path, len(head) + sum(each.nbytes for each in tensors.values()), head)


def write_ctranslate2(
    path: Path,
    tensors: Tensors,
    *,
    spec: str,
    revision: int,
    aliases: Mapping[str, str],
    values: Mapping[str, int],
) -> None:
    """Write a `model.bin` of CTranslate2's whose weights are holes.

    `aliases` are names of the same variable. `values` are those of scalars, otherwise zero.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<I", BINARY_VERSION) + _string(spec))
        file.write(struct.pack("<II", revision, len(tensors)))
        for name, tensor in tensors.items():
            rank = len(tensor.shape)
            file.write(_string(name) + struct.pack(f"<B{rank}I", rank, *tensor.shape))
            file.write(struct.pack("<BI", TYPES.index(tensor.dtype), tensor.nbytes))
            if name in values:
                file.write(values[name].to_bytes(tensor.nbytes, "little", signed=True))
            else:
                file.seek(tensor.nbytes, 1)
        file.write(struct.pack("<I", len(aliases)))
        for pair in aliases.items():
            file.write(b"".join(map(_string, pair)))


def _string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data
