"""LoRAs that an admin adds to the folder of a model, and deletes from it."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from engine.config import ModelConfig
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.files.atomic import new_file, new_folder, remove_folder
from engine.files.lora_folder import LORA_FILE, PEFT_CONFIG, PEFT_WEIGHTS
from engine.files.safetensors_header import tensor_sizes
from engine.runtimes.base import Runtime
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


def runtime_of(model: ModelConfig) -> type[Runtime]:
    """The runtime, which knows the form of the LoRAs."""
    return runtime_class(model.runtime)


def folder_of(model: ModelConfig) -> Path:
    """Where a model's LoRAs are.

    Raises:
        InvalidRequest: the model has no folder for them.

    """
    folder = runtime_of(model).lora_folder(model)
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


def add(
    model: ModelConfig,
    name: str,
    data: BinaryIO,
    peft_config: BinaryIO | None = None,
    *,
    cache_dir: Path,
) -> int:
    """Put a LoRA into a model's folder, complete or not at all; returns its bytes.

    A LoRA of a language model has `peft_config`, its adapter_config.json, and is checked against
    the model. Of one for images only the header is looked at: the first request shows whether the
    tensors fit the model.

    Raises:
        InvalidRequest: the name is bad, or the file is not a LoRA, or it does not fit.
        Conflict: the name is taken, or the folder cannot be written, or the disk is full.

    """
    name = check_name(name)
    folder = folder_of(model)
    runtime = runtime_of(model)
    if runtime.peft_loras != (peft_config is not None):
        given = "needs its adapter_config.json" if runtime.peft_loras else "takes the file alone"
        raise InvalidRequest(f"A LoRA for {model.id!r} {given}.", param="config")
    if name in runtime.lora_names(model):
        raise Conflict(f"The model {model.id!r} has a LoRA {name!r} already.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if peft_config is not None:
            with new_folder(folder / name) as unfinished:
                check_file(_write(unfinished / PEFT_WEIGHTS, data))
                _write(unfinished / PEFT_CONFIG, peft_config)
                runtime.check_lora(model, unfinished, cache_dir)
                return _size(unfinished)
        with new_file(folder / f"{name}{_SUFFIX}", overwrite=False) as unfinished:
            check_file(_write(unfinished, data))
            return _size(unfinished)
    except FileExistsError as error:
        raise Conflict(f"A LoRA {name!r} is there, or just being added.") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise Conflict(f"The LoRA cannot be kept in {folder.name}: {reason}.") from error


def find(model: ModelConfig, name: str) -> Path:
    """The file or folder of a LoRA in a model's folder.

    Raises:
        NotFound: there is none of that name.
        Conflict: the configuration names it, so it is not in the folder.
        InvalidRequest: the model has no folder for them.

    """
    folder_of(model)
    runtime = runtime_of(model)
    if (path := runtime.lora_files(model).get(name)) is not None:
        # `NAME/` with the file that diffusers writes
        return path.parent if path.name == LORA_FILE else path
    if name in runtime.lora_names(model):
        raise Conflict(f"The LoRA {name!r} of {model.id!r} is named by the configuration.")
    raise NotFound(f"The model {model.id!r} has no LoRA {name[:100]!r}.")


def remove(path: Path) -> int:
    """Delete the file or folder of a LoRA, and return its bytes.

    Raises:
        Conflict: it cannot be deleted.

    """
    try:
        nbytes = _size(path)
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise Conflict(f"The LoRA {path.stem!r} cannot be deleted: {why}.") from error
    return nbytes


def size_of(model: ModelConfig, name: str) -> int | None:
    """Bytes of a LoRA in the model's folder; None of one that the configuration names."""
    path = runtime_of(model).lora_files(model).get(name)
    try:
        return None if path is None else _size(path)
    except OSError:  # just being deleted
        return None


def _write(path: Path, data: BinaryIO) -> Path:
    with path.open("wb") as file:
        shutil.copyfileobj(data, file, 2**20)
    return path


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.iterdir())
    return path.stat().st_size


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
