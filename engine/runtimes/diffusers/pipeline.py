"""A diffusers model: its parts, and the pipelines that are made of them.

Importing this module imports torch and diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from engine.errors import ConfigError, InvalidRequest, LoadFailed
from engine.memory.host_memory import HostMemory
from engine.process.gate import GATE
from engine.runtimes.common.torch_run import TorchParts, named_tensors
from engine.runtimes.diffusers.loras import Loras
from engine.runtimes.diffusers.options import OFFLOADED, DiffusersOptions


class Pipeline(TorchParts):
    """The parts of one model, and the pipelines that are made of them."""

    def __init__(
        self,
        folder: Path,
        folders: Mapping[str, Path],
        adapters: Mapping[str, Path],
        options: DiffusersOptions,
        device: str,
        *,
        group_offload: bool,
    ) -> None:
        """Build every part in host memory. Call inside `GATE.exclusive()`, then `place` outside.

        `folders` has the folder of each part that comes from elsewhere, by the part's name.
        `adapters` has the folders of LoRAs beside those of `options.loras`. With `group_offload`
        the layers of denoiser and text encoders come to the device only while they compute.

        Raises:
            ConfigError: the options name what does not exist.
            LoadFailed: a weight is missing.

        """
        self.options = options
        self.group_offload = group_offload
        self.base = _from_pretrained(folder, folders, options)
        if getattr(self.base, "motion_adapter", None) is not None:
            # The library copied its weights into the UNet. Kept, they would be in memory twice.
            self.base.register_modules(motion_adapter=None)
        self.controlnet: Any = None
        if "controlnet" in folders:
            self.controlnet = diffusers.ControlNetModel.from_pretrained(
                folders["controlnet"], dtype=_dtype(options), use_safetensors=True
            )
        if options.ip_adapter is not None:
            self.base.load_ip_adapter(
                str(folders["ip_adapter"]),
                subfolder=options.ip_adapter.subfolder,
                weight_name=options.ip_adapter.weight_name,
            )
        if options.scheduler:
            self.base.scheduler = _scheduler(self.base.scheduler, dict(options.scheduler))
        modules = self.modules()
        for name, module in modules.items():
            missing = [key for key, tensor in named_tensors(module) if tensor.is_meta]
            if missing:
                raise LoadFailed(f"{folder.name}/{name}: the checkpoint lacks {missing[0]}")
            module.eval()
        if options.vae_tiling:
            self.base.vae.enable_tiling()
        if options.attention == "xformers":
            self.base.enable_xformers_memory_efficient_attention()
        super().__init__(modules, device)
        self._variants: dict[str, Any] = {}
        self.loras = Loras(self.base, options.loras, adapters)

    def place(self, host: HostMemory | None) -> None:
        """Bring the parts onto the device as the base class does, or hook up their offloading."""
        if self.group_offload:
            with GATE.exclusive():
                for name, module in self.modules().items():
                    if name.startswith(OFFLOADED):
                        diffusers.hooks.apply_group_offloading(
                            module,
                            onload_device=torch.device(self.device),
                            offload_device=torch.device("cpu"),
                            offload_type="leaf_level",
                            use_stream=self.device == "cuda",
                        )
            self._parts = {
                name: module
                for name, module in self.modules().items()
                if not name.startswith(OFFLOADED)
            }
        super().place(host)

    def park(self, blocks: Collection[str]) -> None:
        """Take parts off the device."""
        self.loras.set(())  # they are small, and quickly attached again
        super().park(blocks)

    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts that hold weights, by their name."""
        parts = {**self.base.components, "controlnet": self.controlnet}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def variant(self, kind: str) -> Any:
        """The pipeline of the same parts for text, image, inpaint, control or video-image.

        Raises:
            InvalidRequest: the family has none.

        """
        if kind not in self._variants:
            self._variants[kind] = self._make_variant(kind)
        return self._variants[kind]

    def _make_variant(self, kind: str) -> Any:
        accepts = inspect.signature(self.base.__call__).parameters
        if kind == "text" or (kind in ("image", "video-image") and "image" in accepts):
            return self.base
        try:
            with GATE.exclusive():
                if kind == "image":
                    made = AutoPipelineForImage2Image.from_pipe(self.base)
                elif kind == "inpaint":
                    made = AutoPipelineForInpainting.from_pipe(self.base)
                elif kind == "control":
                    made = AutoPipelineForText2Image.from_pipe(
                        self.base, controlnet=self.controlnet
                    )
                else:
                    made = self._image_to_video()
        except ValueError as error:
            fields = {
                "inpaint": "mask",
                "control": "control_image",
                "video-image": "input_reference",
            }
            field = fields.get(kind, "image")
            raise InvalidRequest(
                f"{type(self.base).__name__} cannot do this: {error}", param=field
            ) from error
        made.set_progress_bar_config(disable=True)
        return made

    def _image_to_video(self) -> Any:
        for family, kind in AUTO_TEXT2VIDEO_PIPELINES_MAPPING.items():
            if type(self.base) is kind and family in AUTO_IMAGE2VIDEO_PIPELINES_MAPPING:
                return AUTO_IMAGE2VIDEO_PIPELINES_MAPPING[family](**self.base.components)
        raise ValueError("no pipeline of this family starts from an image")


def _from_pretrained(folder: Path, folders: Mapping[str, Path], options: DiffusersOptions) -> Any:
    name = options.pipeline or "DiffusionPipeline"
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ConfigError(f"options.pipeline: diffusers has no {name!r}")
    parts = {}
    for part in options.components:
        index = diffusers.DiffusionPipeline.load_config(folder)
        library, component = index.get(part, (None, None))
        component = component or {"motion_adapter": "MotionAdapter"}.get(part)
        module = diffusers if library in (None, "diffusers") else import_module(library)
        if component is None or not hasattr(module, component):
            raise ConfigError(f"options.components.{part}: the pipeline has no such part")
        parts[part] = getattr(module, component).from_pretrained(
            folders[part], dtype=_dtype(options), use_safetensors=True
        )
    dtypes = {"default": _dtype(options)}
    if options.vae_dtype is not None:
        dtypes["vae"] = getattr(torch, options.vae_dtype)
    pipe = kind.from_pretrained(
        folder,
        dtype=dtypes,
        variant=options.variant,
        use_safetensors=True,
        local_files_only=True,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(present: Any, settings: dict[str, Any]) -> Any:
    name = settings.pop("class", type(present).__name__)
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ConfigError(f"options.scheduler.class: diffusers has no scheduler {name!r}")
    return kind.from_config(present.config, **settings)


def _dtype(options: DiffusersOptions) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype
