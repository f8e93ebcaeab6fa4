"""LoRAs that an admin adds to the folder of a model."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from engine.config import ModelConfig
from engine.errors import Conflict, InvalidRequest
from engine.files.safetensors_header import tensor_sizes
from engine.runtimes.diffusers.files import lora_files
from engine.runtimes.diffusers.options import DiffusersOptions

MAX_LORA_BYTES = 4 * 2**30
"""The largest for FLUX are some 2.5 GB."""

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit (`MAX_HEADER_SIZE` in safetensors' tensor.rs)."""

LEFTOVER_S = 86_400.0
"""An unfinished file that is older was left by a killed process."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SUFFIX = ".safetensors"
_UNFINISHED = ".part"
_LORA_KEY = re.compile(
    r"lora[_.](?:A|B|up|down|mid|embedding|linear_layer)\b|lora_(?:unet|te\d?|transformer)_|"
    r"\.(?:lora_[ABEUd]|alpha|dora_scale|diff|diff_b|hada_\w+|lokr_\w+)(?:\.|$)|_lora\."
)
"""Names of tensors in LoRAs: PEFT's and diffusers' (`lora_A`, `lora.up`), kohya's (`lora_unet_…`,
`.alpha`), LyCORIS's (`hada_`, `lokr_`)."""


def folder_of(model: ModelConfig) -> Path:
    """Where a model's LoRAs are.

    Raises:
        InvalidRequest: it has no folder for them.

    """
    if not isinstance(model.options, DiffusersOptions) or model.options.loras is None:
        raise InvalidRequest(
            f"The model {model.id!r} has no folder of LoRAs (its options name no `loras`).",
            param="model",
        )
    return model.options.loras.expanduser()


def check_name(name: str) -> str:
    """The name that requests will use, without its suffix.

    Raises:
        InvalidRequest: it is none, or could lead out of the folder.

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
    """Put a LoRA into a model's folder, whole or not at all; returns its path.

    The header alone is looked at: whether the tensors fit the model is told by the first request.

    Raises:
        InvalidRequest: the name, or no safetensors file, or no LoRA in it.
        Conflict: there is one of that name, or the folder cannot be written, or is full.

    """
    name = check_name(name)
    folder = folder_of(model)
    if name in lora_files(folder):
        raise Conflict(f"The model {model.id!r} has a LoRA {name!r} already.")
    path = folder / f"{name}{_SUFFIX}"
    # A name of its own: what a killed process left must not be in the way.
    unfinished = folder / f".{name}.{secrets.token_hex(8)}{_UNFINISHED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with unfinished.open("xb") as file:
            try:
                shutil.copyfileobj(data, file, 2**20)
                file.flush()
                os.fsync(file.fileno())
                check_file(unfinished)
                os.link(unfinished, path)  # unlike a rename it replaces nothing
            finally:
                unfinished.unlink()
    except FileExistsError as error:
        raise Conflict(f"A LoRA {name!r} is there, or just being added.") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise Conflict(f"The LoRA cannot be kept in {folder}: {reason}.") from error
    return path


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - LEFTOVER_S:
                path.unlink()


def check_file(path: Path) -> None:
    """Refuse what is no LoRA. Reads the header only, and runs nothing of it.

    Raises:
        InvalidRequest: it is no safetensors file, is torn, or its tensors are no adapter's.

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
