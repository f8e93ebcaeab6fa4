"""LoRAs that an admin adds to the folder of a model."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from engine.config import ModelConfig
from engine.errors import Conflict, InvalidRequest
from engine.files.atomic import new_file
from engine.files.lora_folder import lora_files
from engine.files.safetensors_header import tensor_sizes
from engine.runtimes.registry import runtime_class

MAX_LORA_BYTES = 4 * 2**30
"""The largest for FLUX are some 2.5 GB."""

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit (`MAX_HEADER_SIZE` in safetensors' tensor.rs)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SUFFIX = ".safetensors"
_LORA_KEY = re.compile(
    r"lora[_.](?:A|B|up|down|mid|embedding|linear_layer)\b|lora_(?:unet|te\d?|transformer)_|"
    r"\.(?:lora_[ABEUd]|alpha|dora_scale|diff|diff_b|hada_\w+|lokr_\w+)(?:\.|$)|_lora\."
)
"""Names of tensors in LoRAs: PEFT's and diffusers' (`lora_A`, `lora.up`), kohya's (`lora_unet_…`,
`.alpha`), LyCORIS's (`hada_`, `lokr_`)."""


def folder_of(model: ModelConfig) -> Path:
    """Where a model's LoRAs are.

    Raises:
        InvalidRequest: the model has no folder for them.

    """
    folder = runtime_class(model.runtime).lora_folder(model)
    if folder is None:
        raise InvalidRequest(
            f"The model {model.id!r} has no folder of LoRAs (its options name no `loras`).",
            param="model",
        )
    return folder


def check_name(name: str) -> str:
    """The name that requests will use, without the suffix of the file.

    Raises:
        InvalidRequest: it is not a name, or could lead out of the folder.

    """
    name = name.removesuffix(_SUFFIX)
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            "A LoRA's name is 1 to 100 letters, digits, dots, dashes and underscores, and begins"
            " with a letter or digit.",
            param="name",
        )
    return name


def add(model: ModelConfig, name: str, data: BinaryIO) -> Path:
    """Put a LoRA into a model's folder, complete or not at all; returns its path.

    Only the header is looked at: the first request shows whether the tensors fit the model.

    Raises:
        InvalidRequest: the name is bad, or the file is not a LoRA.
        Conflict: the name is taken, or the folder cannot be written, or the disk is full.

    """
    name = check_name(name)
    folder = folder_of(model)
    if name in lora_files(folder):
        raise Conflict(f"The model {model.id!r} has a LoRA {name!r} already.")
    path = folder / f"{name}{_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path, overwrite=False) as unfinished:
            with unfinished.open("wb") as file:
                shutil.copyfileobj(data, file, 2**20)
            check_file(unfinished)
    except FileExistsError as error:
        raise Conflict(f"A LoRA {name!r} is there, or just being added.") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise Conflict(f"The LoRA cannot be kept in {folder}: {reason}.") from error
    return path


def check_file(path: Path) -> None:
    """Refuse a file that is not a LoRA. Reads only the header, and runs nothing of it.

    Raises:
        InvalidRequest: it is not a safetensors file, is cut off, or has tensors of another kind.

    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        names = tensor_sizes([path]).keys()
    except (OSError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise InvalidRequest("The file is no complete safetensors file.", param="file") from error
    if not names:
        raise InvalidRequest("There is no tensor in the file.", param="file")
    other = next((name for name in names if not _LORA_KEY.search(name)), None)
    if other is not None:
        raise InvalidRequest(f"The file is no LoRA: it has a tensor {other[:100]!r}.", param="file")
