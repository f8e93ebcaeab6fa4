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
import transformers

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
from engine.runtimes.diffusers.description import PipelineDescription
from engine.runtimes.diffusers.families import family_of
from engine.runtimes.diffusers.files import component_weights
from engine.runtimes.diffusers.loras import Loras
from engine.runtimes.diffusers.options import OFFLOADED, TILE_SIDE, DiffusersOptions
from engine.runtimes.diffusers.pipeline_arguments import call_parameters


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
        self.family = family_of(type(self.base).__name__, PipelineDescription.read(folder))
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
            _decode_in_tiles(self.base.vae)
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
        accepts = call_parameters(self.base)
        if kind == "text" or (kind in ("image", "video-image") and "image" in accepts):
            return self.base
        try:
            with GATE.exclusive():
                if kind == "image":
                    made = AutoPipelineForImage2Image.from_pipe(self.base)
                elif kind == "inpaint":
                    made = self._inpainting()
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

    def _inpainting(self) -> Any:
        # The library's own table of such pipelines lacks it.
        if type(self.base) is diffusers.Flux2KleinPipeline:
            return self._of_same_parts(diffusers.Flux2KleinInpaintPipeline)
        return AutoPipelineForInpainting.from_pipe(self.base)

    def _image_to_video(self) -> Any:
        if type(self.base) is diffusers.WanPipeline and self.base.config.expand_timesteps:
            made = self._of_same_parts(diffusers.WanImageToVideoPipeline)
            # Its own fails without `ftfy`, a package that the base's does without.
            made._get_t5_prompt_embeds = self.base._get_t5_prompt_embeds
            return made
        for family, kind in AUTO_TEXT2VIDEO_PIPELINES_MAPPING.items():
            if type(self.base) is kind and family in AUTO_IMAGE2VIDEO_PIPELINES_MAPPING:
                return self._of_same_parts(AUTO_IMAGE2VIDEO_PIPELINES_MAPPING[family])
        raise ValueError("no pipeline of this family starts from an image")

    def _of_same_parts(self, kind: Any) -> Any:
        """Another pipeline with the parts and the settings of this one."""
        taken = inspect.signature(kind.__init__).parameters
        known = {**self.base.config, **self.base.components}
        return kind(**{name: known[name] for name in taken if name in known})


def _from_pretrained(folder: Path, folders: Mapping[str, Path], options: DiffusersOptions) -> Any:
    name = options.pipeline or "DiffusionPipeline"
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ConfigError(f"options.pipeline: diffusers has no {name!r}")
    index = diffusers.DiffusionPipeline.load_config(folder)
    parts = _checked_parts(folder, index, options)
    for part in options.components:
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


def _checked_parts(
    folder: Path, index: Mapping[str, Any], options: DiffusersOptions
) -> dict[str, Any]:
    """The parts that transformers loads, such as text encoders.

    It fills a parameter that the checkpoint lacks with random numbers, and only warns.
    """
    kind = getattr(diffusers, options.pipeline or str(index.get("_class_name")), None)
    taken = inspect.signature(kind.__init__).parameters if kind is not None else ()
    parts = {}
    for name, value in index.items():
        if name not in taken or name in options.components or not isinstance(value, list):
            continue
        found = getattr(transformers, str(value[1]), None) if value[0] == "transformers" else None
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            continue
        varied = any(
            f".{options.variant}." in path.name
            for path in component_weights(folder / name, options.variant)
        )
        model: Any = found
        part, report = model.from_pretrained(
            folder / name,
            dtype=_dtype(options),
            variant=options.variant if varied else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise LoadFailed(f"{folder.name}/{name}: the checkpoint lacks {missing[0]}")
        parts[name] = part
    return parts


def _scheduler(present: Any, settings: dict[str, Any]) -> Any:
    name = settings.pop("class", type(present).__name__)
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ConfigError(f"options.scheduler.class: diffusers has no scheduler {name!r}")
    return kind.from_config(present.config, **settings)


def _dtype(options: DiffusersOptions) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _decode_in_tiles(vae: Any) -> None:
    """Let a VAE work in tiles of the size that its working memory is estimated from."""
    vae.enable_tiling()
    if getattr(vae, "tile_sample_min_size", 0) > TILE_SIDE:
        # By default a tile has the size of the training's images: SDXL's, FLUX's and Z-Image's of
        # 1024x1024 pixels would be no smaller in tiles.
        scale = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_SIDE, TILE_SIDE // scale
