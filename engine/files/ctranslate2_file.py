"""CTranslate2's `model.bin`: what is in it, and how one is written.

The format, little-endian, is that of `ctranslate2.specs.model_spec.ModelSpec._serialize` at
binary version 6: version, name and revision of the specification, then every variable as name,
shape, type, byte count and bytes, then aliases of variables that are the same.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINARY_VERSION = 6
TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
"""By type id (`DataType` in CTranslate2's include/ctranslate2/types.h)."""
ITEM_BYTES = {"float32": 4, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Variable:
    """One tensor or scalar of a model."""

    shape: tuple[int, ...]
    dtype: str
    """One of `TYPES`."""

    @property
    def count(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_variables(path: Path) -> dict[str, Variable]:
    """The variables by name, aliases left out. Reads no weight.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated, or of another format.

    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        try:
            (version,) = _unpack(file, "<I")
            if version != BINARY_VERSION:
                raise ValueError(f"{path.name} has the binary version {version}, not 6")
            _read_string(file)
            _revision, count = _unpack(file, "<II")
            found: dict[str, Variable] = {}
            for _ in range(count):
                name = _read_string(file)
                (rank,) = _unpack(file, "<B")
                shape = _unpack(file, f"<{rank}I")
                type_id, _nbytes = _unpack(file, "<BI")
                variable = found[name] = Variable(shape, TYPES[type_id])
                # The byte count in the file has 32 bits, which a large tensor exceeds.
                end = file.seek(variable.count * ITEM_BYTES[variable.dtype], 1)
                if end > size_bytes:
                    raise ValueError(f"{path.name} is truncated")
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path.name} is damaged") from error
    return found


def weight_bytes(variables: Mapping[str, Variable], compute_type: str) -> int:
    """Bytes that the variables take once CTranslate2 has loaded them.

    It converts them as it loads: weights of linear layers and embeddings to the first part of
    the compute type, whatever else is a float to the last (`Model::set_compute_type` in
    src/models/model.cc). An int8 weight has one float32 scale for each row.
    """
    weight_type = compute_type.split("_")[0]
    float_type = compute_type.split("_")[-1].replace("int8", "float32")
    total = 0
    for name, variable in variables.items():
        quantizable = name.endswith("/weight") and "conv" not in name
        if name.endswith("_scale") or not variable.shape:
            continue
        if quantizable:
            total += variable.count * ITEM_BYTES[weight_type]
            total += variable.shape[0] * 4 if weight_type == "int8" else 0
        elif variable.dtype in ("int8", "int16", "int32"):
            total += variable.count * ITEM_BYTES[variable.dtype]
        else:
            total += variable.count * ITEM_BYTES[float_type]
    return total


def write_variables(
    path: Path, spec: str, revision: int, variables: Mapping[str, NDArray[Any]]
) -> None:
    """Write a model: arrays by name, of dimension 0 for a scalar.

    Raises:
        OSError: the file cannot be written.

    """
    with path.open("wb") as file:
        file.write(struct.pack("<I", BINARY_VERSION))
        _write_string(file, spec)
        file.write(struct.pack("<II", revision, len(variables)))
        for name, array in sorted(variables.items()):
            _write_string(file, name)
            file.write(struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
            file.write(struct.pack("<BI", TYPES.index(array.dtype.name), array.nbytes))
            file.write(array.tobytes())
        file.write(struct.pack("<I", 0))  # aliases


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<H")
    return file.read(length)[:-1].decode()


def _write_string(file: BinaryIO, text: str) -> None:
    data = text.encode() + b"\0"
    file.write(struct.pack("<H", len(data)) + data)
