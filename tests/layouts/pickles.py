"""Pickled checkpoints of real shapes, each tensor one stored number that is repeated.

Importing this module imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.layouts.sparse import Tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def write_pickle(path: Path, tensors: Tensors, beside: dict[str, Any] | None = None) -> None:
    """Write a file of `torch.save`. A name `a:b` is `b` in the mapping `a`."""
    found: dict[str, Any] = dict(beside or {})
    for name, tensor in tensors.items():
        *outer, inner = name.split(":")
        place = found
        for each in outer:
            place = place.setdefault(each, {})
        place[inner] = torch.zeros((), dtype=DTYPES[tensor.dtype]).expand(tensor.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
