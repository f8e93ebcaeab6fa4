"""Pickled checkpoints, read in the only way that runs no code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from engine.errors import LoadFailed, reason


def load_pickled(path: Path, *, device: str = "cpu") -> Any:
    """The tensors and plain containers of a file. The device `meta` gives only their shapes.

    Imports torch.

    Raises:
        LoadFailed: the file is missing or damaged, or holds what would have to be executed.

    """
    import torch

    try:
        return torch.load(
            path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise LoadFailed(
            f"{path.parent.name}/{path.name}: damaged, or it holds more than tensors; objects that"
            " would have to be executed are not read"
        ) from error
    except Exception as error:  # damaged bytes make torch raise errors of many types
        raise LoadFailed(f"{path.parent.name}/{path.name}: {reason(error)}") from error
