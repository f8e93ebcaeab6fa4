"""The sizes of the tensors in safetensors files, read from their headers only."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8,
              "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
"""Bytes per element of each safetensors dtype."""

FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of each dtype a model may be run in."""

TensorSizes = dict[str, tuple[str, int]]
"""Safetensors dtype and number of elements of each tensor, by the tensor's name."""

TensorShapes = dict[str, tuple[int, ...]]
"""The shape of each tensor, by the tensor's name."""


def tensor_sizes(paths: Iterable[Path]) -> TensorSizes:
    """The tensors in the files. It reads no weight.

    The format is eight bytes of little-endian header length, then the header as JSON
    (https://github.com/huggingface/safetensors#format).

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is truncated, or is not a safetensors file.

    """
    return {name: (kind, prod(shape)) for name, (kind, shape) in _tensors(paths).items()}


def tensor_shapes(paths: Iterable[Path]) -> TensorShapes:
    """The shapes of the tensors in the files. It reads no weight.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is truncated, or is not a safetensors file.

    """
    return {name: tuple(shape) for name, (_, shape) in _tensors(paths).items()}


def weight_bytes(
    tensors: Mapping[str, tuple[str, int]], item_bytes: int, *, as_stored: bool = False
) -> int:
    """Bytes of all tensors. Those of floats have `item_bytes` an element, unless `as_stored`."""
    total = 0
    for kind, count in tensors.values():
        stored = as_stored or kind not in FLOAT_TYPES
        total += count * (ITEM_BYTES.get(kind, 2) if stored else item_bytes)
    return total


def _tensors(paths: Iterable[Path]) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}
    for path in paths:
        try:
            found.update(_header(path))
        except (KeyError, TypeError, struct.error) as error:
            raise ValueError(f"{path.name} is damaged") from error
    return found


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size - 8:
            raise ValueError(f"{path.name} is truncated")
        header = json.loads(file.read(length))
    found: dict[str, tuple[str, list[int]]] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        end = max(end, entry["data_offsets"][1])
        found[name] = (entry["dtype"], entry["shape"])
    if 8 + length + end != path.stat().st_size:
        raise ValueError(f"{path.name} is truncated")
    return found
