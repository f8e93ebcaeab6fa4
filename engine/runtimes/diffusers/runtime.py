"""diffusers: image and video models.

Any pipeline folder or hub repository. What differs between families is data: the table
`FAMILIES` has the demands of their code on sizes and frame counts. The options of a model have
scheduler, steps, guidance and defaults. Nothing here imports diffusers before `start`; the
pipelines themselves run in `engine.runtimes.diffusers.pipeline`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest, LoadFailed
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import local_folder, present_folder
from engine.process.gate import GATE
from engine.requests import ImageRequest, Request, VideoRequest
from engine.runtimes.base import Prepared
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime
from engine.runtimes.diffusers.families import Family, family_of
from engine.runtimes.diffusers.files import (
    CONFIG_FILES,
    LORA_FILE,
    component_weights,
    ip_adapter_files,
)
from engine.runtimes.diffusers.options import OFFLOADED, DiffusersOptions
from engine.runtimes.diffusers.request_checks import RequestChecks

if TYPE_CHECKING:
    from engine.runtimes.diffusers.pipeline import Pipeline  # noqa: F401 - used in a string


class DiffusersModel(TorchModel["Pipeline"]):
    """One pipeline on a thread of its own."""

    def make_run(self, prepared: Prepared, emit: Emit) -> ThreadRun:
        """A call of the pipeline."""
        from engine.runtimes.diffusers.run import Run

        assert self.model is not None
        return Run(self.model, prepared.request, prepared.shape, emit)


class DiffusersRuntime(TorchRuntime):
    """Loads image and video pipelines."""

    name: ClassVar[str] = "diffusers"
    Options: ClassVar[type[Section]] = DiffusersOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        super().__init__(device, cache_dir)
        self._read: dict[tuple[str, str], Mapping[str, Any]] = {}

    def start(self) -> None:
        """Import torch, transformers and diffusers (some seconds)."""
        from engine.runtimes.diffusers.imports import import_everything

        import_everything()

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check sizes, counts, adapters and what the family can do; fill in the defaults."""
        if model.task == "image" and isinstance(request, ImageRequest):
            return self._checks(model).image(request)
        if model.task == "video" and isinstance(request, VideoRequest):
            return self._checks(model).video(request)
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )

    def _checks(self, model: ModelConfig) -> RequestChecks:
        return RequestChecks(
            model.id, model.options, self._family(model), self._decoder_channels(model)
        )

    def _decoder_channels(self, model: ModelConfig) -> int:
        """Channels of the VAE at full size: its second block's come in, its first's go out."""
        config = self._present(model, "vae/config.json")
        try:
            channels = config["block_out_channels"]
            return int(channels[min(1, len(channels) - 1)])
        except (ValueError, KeyError, TypeError, IndexError):
            return 256  # as in SDXL and FLUX

    def _family(self, model: ModelConfig) -> Family:
        """Of the pipeline class; while its files are not here, the run itself checks again."""
        index = self._present(model, "model_index.json")
        return family_of(model.options.pipeline or str(index.get("_class_name", "")))

    def _present(self, model: ModelConfig, name: str) -> Mapping[str, Any]:
        """A JSON file of the model, read once, where it is here already; else nothing."""
        key = model.id, name
        if key not in self._read:
            folder = present_folder(model.source, self._cache_dir, revision=model.options.revision)
            if folder is None:
                return {}
            try:
                self._read[key] = json.loads((folder / name).read_text())
            except (OSError, ValueError):
                return {}
        return self._read[key]

    def _folder(self, model: ModelConfig) -> Path:
        options: DiffusersOptions = model.options
        patterns = None
        if options.variant is not None:
            patterns = [f"*/*.{options.variant}*.safetensors", *CONFIG_FILES]
        return local_folder(
            model.source,
            self._cache_dir,
            revision=options.revision,
            patterns=patterns or ["*/*.safetensors", *CONFIG_FILES],
        )

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """Those of every component."""
        variant = model.options.variant
        parts = self._parts(model).values()
        return [path for folder in parts for path in component_weights(folder, variant)]

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the safetensors headers of every component; fetch the files first if need be."""
        sizes = self._part_bytes(model)
        nbytes = sum(sizes.values())
        streams = self._streams(model, nbytes)
        blocks = tuple(
            Block(name, size, parkable=True)
            for name, size in sizes.items()
            if not (streams and name.startswith(OFFLOADED))
        )
        # Disk at 1 GB/s and a second of building; the first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _parts(self, model: ModelConfig) -> dict[str, Path]:
        """The folder of each component that has one.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """
        options: DiffusersOptions = model.options
        folder = self._folder(model)
        try:
            index = json.loads((folder / "model_index.json").read_text())
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{folder.name}: cannot read model_index.json: {error}") from error
        parts = {
            name: folder / name
            for name, value in index.items()
            if isinstance(value, list) and value and value[0] is not None
        }
        for name, source in options.components.items():
            parts[name] = local_folder(source, self._cache_dir)
        if options.controlnet is not None:
            parts["controlnet"] = local_folder(options.controlnet, self._cache_dir)
        if options.ip_adapter is not None:
            adapter = local_folder(
                options.ip_adapter.source,
                self._cache_dir,
                patterns=ip_adapter_files(options.ip_adapter),
            )
            parts["image_encoder"] = adapter / options.ip_adapter.subfolder / "image_encoder"
            parts["ip_adapter"] = adapter / options.ip_adapter.subfolder
        return parts

    def _part_bytes(self, model: ModelConfig) -> dict[str, int]:
        """Bytes of each component in the dtype it is loaded in.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """
        options: DiffusersOptions = model.options
        sizes = {}
        for name, path in self._parts(model).items():
            try:
                tensors = tensor_sizes(component_weights(path, options.variant))
            except (OSError, ValueError) as error:
                raise LoadFailed(f"{path.parent.name}/{name}: cannot read: {error}") from error
            dtype = options.vae_dtype if name == "vae" else None
            if tensors:
                sizes[name] = weight_bytes(tensors, DTYPE_BYTES[dtype or options.dtype])
        if not sizes:
            raise LoadFailed(f"{model.source}: no .safetensors file in the folder")
        return sizes

    def _streams(self, model: ModelConfig, nbytes: int) -> bool:
        """Whether its large parts stay in host memory, their layers coming when they compute."""
        offload = model.options.offload
        too_large = self.budget_bytes is not None and nbytes > self.budget_bytes
        return offload == "group" or (
            offload == "auto" and self._device.kind == "cuda" and too_large
        )

    def _build(self, model: ModelConfig) -> DiffusersModel:
        from engine.runtimes.diffusers.pipeline import Pipeline

        options: DiffusersOptions = model.options
        sources = dict(options.components)
        if options.controlnet is not None:
            sources["controlnet"] = options.controlnet
        folders = {name: local_folder(each, self._cache_dir) for name, each in sources.items()}
        if (ip_adapter := options.ip_adapter) is not None:
            folders["ip_adapter"] = local_folder(
                ip_adapter.source, self._cache_dir, patterns=ip_adapter_files(ip_adapter)
            )
        adapters = {
            name: local_folder(each, self._cache_dir, patterns=(LORA_FILE,))
            for name, each in options.lora_sources.items()
        }
        folder = self._folder(model)
        group_offload = self._streams(model, sum(self._part_bytes(model).values()))
        with GATE.exclusive():
            pipeline = Pipeline(
                folder, folders, adapters, options, self._device.kind, group_offload=group_offload
            )
        return DiffusersModel(pipeline, model.id)
