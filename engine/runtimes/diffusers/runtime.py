"""diffusers: image and video models.

Any pipeline folder or hub repository. What differs between families is data: the table
`FAMILIES` has the demands of their code on sizes and frame counts. The options of a model have
scheduler, steps, guidance and defaults. Nothing here imports diffusers before `start`; the
pipelines themselves run in `engine.runtimes.diffusers.pipeline`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.memory.block import Block, Estimate
from engine.model_folder import PresentFolders
from engine.process.gate import GATE
from engine.requests import ImageRequest, Request, VideoRequest
from engine.runtimes.base import Prepared, RuntimeContext
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime
from engine.runtimes.diffusers.description import (
    DESCRIPTION_FILES,
    INDEX_FILE,
    PipelineDescription,
)
from engine.runtimes.diffusers.families import family_of
from engine.runtimes.diffusers.files import (
    component_weights,
    ip_adapter_source,
    lora_source,
    part_source,
    pipeline_source,
)
from engine.runtimes.diffusers.options import OFFLOADED, DiffusersOptions
from engine.runtimes.diffusers.recognition import recognise_pipeline
from engine.runtimes.diffusers.request_checks import RequestChecks
from engine.runtimes.recognised import Recognised
from engine.section import Section

if TYPE_CHECKING:
    from engine.runtimes.diffusers.pipeline import Pipeline  # noqa: F401 - used in a string


class DiffusersModel(TorchModel["Pipeline"]):
    """One pipeline on a thread of its own."""

    def make_run(self, prepared: Prepared, emit: Emit) -> ThreadRun:
        """A call of the pipeline."""
        from engine.runtimes.diffusers.run import Run

        assert self.model is not None
        return Run(self.model, prepared.request, prepared.payload, prepared.shape, emit)


class DiffusersRuntime(TorchRuntime):
    """Loads image and video pipelines."""

    name: ClassVar[str] = "diffusers"
    tasks: ClassVar[tuple[str, ...]] = ("image", "video")
    Options: ClassVar[type[Section]] = DiffusersOptions

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._described = PresentFolders(
            context.cache_dir, PipelineDescription.read, DESCRIPTION_FILES
        )

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The pipeline's own repository, then those of parts and adapters from elsewhere."""
        options = model.options_as(DiffusersOptions)
        sources = [pipeline_source(model.source, options)]
        sources += [part_source(part) for part in options.components.values()]
        if options.controlnet is not None:
            sources.append(part_source(options.controlnet))
        if options.ip_adapter is not None:
            sources.append(ip_adapter_source(options.ip_adapter))
        sources += [lora_source(lora) for lora in options.lora_sources.values()]
        return tuple(sources)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """Any repository with a `model_index.json`."""
        return recognise_pipeline(repository)

    @classmethod
    def lora_folder(cls, model: ModelConfig) -> Path | None:
        """The folder that the options name."""
        folder = model.options_as(DiffusersOptions).loras
        return None if folder is None else folder.expanduser()

    @classmethod
    def lora_names(cls, model: ModelConfig) -> tuple[str, ...]:
        """Those of the folder, and those that the options name one by one."""
        further = model.options_as(DiffusersOptions).lora_sources
        return tuple({**further, **cls.lora_files(model)})

    def start(self) -> None:
        """Import torch, transformers and diffusers (some seconds)."""
        from engine.runtimes.diffusers.imports import import_everything

        import_everything()
        from engine.runtimes.diffusers import run  # noqa: F401 - for its imports

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
        options = model.options_as(DiffusersOptions)
        # While the files are not here, the run itself checks what the family demands.
        described = self._described.get(model.source, options.revision) or PipelineDescription()
        pipeline_class = options.pipeline or described.pipeline_class
        family = family_of(pipeline_class, described)
        # A denoiser from elsewhere may differ from the folder's.
        own = not {"unet", "transformer"} & options.components.keys()
        guidance_is_input = described.guidance_is_input if own else None
        return RequestChecks(
            model.id,
            options,
            family,
            described.decoder_channels,
            guidance_is_input,
            pipeline_class,
        )

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """Those of every component."""
        variant = model.options_as(DiffusersOptions).variant
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
        options = model.options_as(DiffusersOptions)
        folder = self._folder(model)
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{folder.name}: cannot read model_index.json: {error}") from error
        unused = family_of(options.pipeline or str(index.get("_class_name", ""))).unused_parts
        parts = {
            name: folder / name
            for name, value in index.items()
            if isinstance(value, list) and value and value[0] is not None and name not in unused
        }
        for name, source in options.components.items():
            parts[name] = self._folder_of(part_source(source))
        if options.controlnet is not None:
            parts["controlnet"] = self._folder_of(part_source(options.controlnet))
        if options.ip_adapter is not None:
            adapter = self._folder_of(ip_adapter_source(options.ip_adapter))
            parts["image_encoder"] = adapter / options.ip_adapter.subfolder / "image_encoder"
            parts["ip_adapter"] = adapter / options.ip_adapter.subfolder
        return parts

    def _part_bytes(self, model: ModelConfig) -> dict[str, int]:
        """Bytes of each component in the dtype it is loaded in.

        Raises:
            LoadFailed: the files are missing or unreadable.

        """
        options = model.options_as(DiffusersOptions)
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
        offload = model.options_as(DiffusersOptions).offload
        too_large = self.context.budget_bytes is not None and nbytes > self.context.budget_bytes
        return offload == "group" or (
            offload == "auto" and self.context.device.kind == "cuda" and too_large
        )

    def _build(self, model: ModelConfig) -> DiffusersModel:
        from engine.runtimes.diffusers.pipeline import Pipeline

        options = model.options_as(DiffusersOptions)
        sources = dict(options.components)
        if options.controlnet is not None:
            sources["controlnet"] = options.controlnet
        folders = {name: self._folder_of(part_source(each)) for name, each in sources.items()}
        if options.ip_adapter is not None:
            folders["ip_adapter"] = self._folder_of(ip_adapter_source(options.ip_adapter))
        adapters = {
            name: self._folder_of(lora_source(each)) for name, each in options.lora_sources.items()
        }
        folder = self._folder(model)
        group_offload = self._streams(model, sum(self._part_bytes(model).values()))
        with GATE.exclusive():
            pipeline = Pipeline(
                folder,
                folders,
                adapters,
                options,
                self.context.device.kind,
                group_offload=group_offload,
            )
        return DiffusersModel(pipeline, model.id)
