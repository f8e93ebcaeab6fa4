"""The LoRAs of one pipeline. Requests name them, and the latest few stay attached.

Importing this module imports torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import InvalidRequest, reason
from engine.files.lora_folder import LORA_FILE, lora_files
from engine.files.safetensors_header import tensor_sizes
from engine.process.gate import GATE
from engine.requests import LoraChoice
from engine.runtimes.common.torch_run import named_tensors

MAX_LORAS = 4
"""LoRAs that stay attached for the next request. Beyond that, the least recently used one goes."""


class Loras:
    """The LoRAs attached to a pipeline. The weights of the model itself never change."""

    def __init__(self, base: Any, folder: Path | None, folders: Mapping[str, Path]) -> None:
        """`base` is the pipeline of the library.

        `folder` holds LoRAs by their file name. `folders` has the folder of each further LoRA by
        its name.
        """
        self._base = base
        self._folder = folder
        self._folders = folders
        self._attached: OrderedDict[str, str] = OrderedDict()
        """Name of the LoRA → name of its adapter in the library; the latest use comes last."""
        self._stamps: dict[str, tuple[int, int]] = {}
        self._count = 0
        """LoRAs attached so far, for names that do not repeat."""

    def set(self, choices: tuple[LoraChoice, ...]) -> None:
        """Make exactly these LoRAs act.

        Raises:
            InvalidRequest: one does not fit the model.

        """
        if not choices and not self._attached:
            return
        with GATE.exclusive():
            for choice in choices:
                self._detach_if_changed(choice.name)
            for index, choice in enumerate(choices):
                if choice.name in self._attached:
                    self._attached.move_to_end(choice.name)
                else:
                    self._attach(choice.name, f"loras[{index}].name")
            while len(self._attached) > max(MAX_LORAS, len(choices)):
                _, adapter = self._attached.popitem(last=False)
                self._base.delete_adapters(adapter)
            if not choices:
                # A disabled adapter still costs a call a layer. A request without LoRAs has none.
                self._base.unload_lora_weights()
                self._attached.clear()
                return
            names = [self._attached[choice.name] for choice in choices]
            self._base.set_adapters(names, [choice.weight for choice in choices])

    def _path(self, name: str) -> Path:
        return lora_files(self._folder).get(name) or self._folders[name] / LORA_FILE

    def _detach_if_changed(self, name: str) -> None:
        """Detach a LoRA whose file is another than the one attached: it was deleted and added."""
        if name in self._attached and self._stamps[name] != _stamp(self._path(name)):
            self._base.delete_adapters(self._attached.pop(name))

    def _attach(self, name: str, param: str) -> None:
        path = self._path(name)
        self._stamps[name] = _stamp(path)
        self._count += 1
        adapter = f"lora{self._count}"  # peft takes no dots in a name
        try:
            self._base.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=adapter, local_files_only=True
            )
            filled = sum(
                f".{adapter}." in key
                for part in self._base.components.values()
                if isinstance(part, torch.nn.Module)
                for key, _ in named_tensors(part)
            )
            wanted = sum(".alpha" not in key for key in tensor_sizes([path]))
            if filled < wanted:
                raise ValueError(f"{wanted - filled} of its {wanted} tensors have no place")
        except Exception as error:
            if any(adapter in names for names in self._base.get_list_adapters().values()):
                self._base.delete_adapters(adapter)
            raise InvalidRequest(
                f"The LoRA {name!r} does not fit the model: {reason(error)}", param=param
            ) from error
        self._attached[name] = adapter


def _stamp(path: Path) -> tuple[int, int]:
    """What another file of the same name has otherwise."""
    try:
        status = path.stat()
    except OSError:  # attaching it gives the error
        return 0, 0
    return status.st_ino, status.st_mtime_ns
