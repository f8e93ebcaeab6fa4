"""Where the LoRAs of a model are, and whether they fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed, ModelNotFound
from engine.files.hub.selection import HubSource
from engine.files.lora_folder import PEFT_CONFIG, PEFT_WEIGHTS, peft_folders
from engine.files.safetensors_header import tensor_shapes
from engine.model_folder import present_folder
from engine.runtimes.vllm.adapter_files import AdapterFiles
from engine.runtimes.vllm.options import VllmOptions


def lora_source(source: str) -> HubSource:
    """The files of a LoRA."""
    return HubSource(source, (PEFT_CONFIG, PEFT_WEIGHTS))


def folder_of_loras(model: ModelConfig) -> Path | None:
    """The folder that the options name."""
    folder = model.options_as(VllmOptions).loras
    return None if folder is None else folder.expanduser()


def loras_in_folder(model: ModelConfig) -> Mapping[str, Path]:
    """The folders of LoRAs in that folder."""
    return peft_folders(folder_of_loras(model))


def lora_names(model: ModelConfig) -> tuple[str, ...]:
    """Those of the folder, and those that the options name one by one."""
    options = model.options_as(VllmOptions)
    if not options.takes_loras:
        return ()
    return tuple({**options.lora_sources, **loras_in_folder(model)})


def check_lora(model: ModelConfig, folder: Path, cache_dir: Path) -> None:
    """Check its files, against those of the model if they are here.

    Raises:
        InvalidRequest: with the reason.

    """
    options = model.options_as(VllmOptions)
    base = present_folder(model.source, cache_dir, revision=options.revision)
    shapes = None if base is None else tensor_shapes(sorted(base.glob("*.safetensors")))
    AdapterFiles(folder).check(options, shapes or None)


class LoraFolders:
    """The LoRAs of all models of a runtime. Each is checked once, until its files change."""

    def __init__(self, cache_dir: Path, folder_of: Callable[[HubSource], Path]) -> None:
        """`folder_of` finds the files of a source that is here, and raises `LoadFailed`."""
        self._cache_dir = cache_dir
        self._folder_of = folder_of
        self._checked: dict[tuple[str, str], Any] = {}
        """Model and name of each LoRA that fits, with what was looked at."""

    def find(self, model: ModelConfig, name: str) -> Path:
        """The folder of a LoRA.

        Raises:
            ModelNotFound: there is none of that name.
            LoadFailed: its files are still to be fetched.

        """
        own = loras_in_folder(model).get(name)
        if own is not None:
            return own
        source = model.options_as(VllmOptions).lora_sources.get(name)
        if source is None:
            raise ModelNotFound(f"The model '{model.id}:{name}' does not exist.", param="model")
        return self._folder_of(lora_source(source))

    def check(self, model: ModelConfig, name: str) -> None:
        """Return if a LoRA fits the model, as far as the files are here.

        Raises:
            ModelNotFound: there is none of that name.
            InvalidRequest: with the reason.

        """
        try:
            folder = self.find(model, name)
        except LoadFailed:
            return  # its files are still to be fetched
        stamps = [folder / each for each in (PEFT_WEIGHTS, PEFT_CONFIG)]
        try:
            stamp = (model, *((each.stat().st_ino, each.stat().st_mtime_ns) for each in stamps))
        except OSError:
            stamp = None
        key = (model.id, name)
        if stamp is None or self._checked.get(key) != stamp:
            try:
                check_lora(model, folder, self._cache_dir)
            except InvalidRequest as error:
                raise InvalidRequest(f"{name}: {error.message}", param="model") from error
            if stamp is not None:
                self._checked[key] = stamp

    def check_configured(self, model: ModelConfig) -> None:
        """Refuse a model whose options name a LoRA that it cannot serve.

        One in the folder is refused when a request asks for it: the others are served.

        Raises:
            LoadFailed: naming the LoRA.

        """
        for name, source in model.options_as(VllmOptions).lora_sources.items():
            folder = self._folder_of(lora_source(source))
            try:
                check_lora(model, folder, self._cache_dir)
            except InvalidRequest as error:
                raise LoadFailed(f"options.lora_sources.{name}: {error.message}") from error
