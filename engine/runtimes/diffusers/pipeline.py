"""diffusers pipelines: built, called with a request, stopped within a step.

Importing this module imports torch and diffusers.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from engine.errors import ConfigError, InvalidRequest, LoadFailed
from engine.events import Event, ImageResult, PartialImage, Progress, VideoResult
from engine.files.lora_folder import LORA_FILE, lora_files
from engine.files.safetensors_header import tensor_sizes
from engine.memory.host_memory import HostMemory
from engine.process.gate import GATE
from engine.requests import ImageRequest, LoraChoice, VideoRequest
from engine.runtimes.common.torch_run import TorchParts, TorchRun
from engine.runtimes.diffusers.families import check_size, family_of
from engine.runtimes.diffusers.options import OFFLOADED, DiffusersOptions

log = logging.getLogger(__name__)

MAX_LORAS = 4
"""Adapters that stay in a pipeline for the next request; beyond, the one longest unused goes."""

LAZY_MODULES = (
    "diffusers.loaders.peft",
    "diffusers.pipelines.animatediff.pipeline_animatediff",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.pipelines.wan.pipeline_wan",
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""What diffusers imports only at the first load of a family: seconds that belong to the start."""


def import_everything() -> None:
    """Import what the first loads would import."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for module in LAZY_MODULES:
        import_module(module)


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
        """Build every part in host memory.

        `folders` has the parts that come from elsewhere, by their name, `adapters` the folders of
        LoRAs beside those of `options.loras`. With `group_offload` the layers of denoiser and text
        encoders come to the device only while they compute. Call inside `GATE.exclusive()`; then
        `place`, outside of it.

        Raises:
            ConfigError: the options name what does not exist.
            LoadFailed: a weight is missing.

        """
        self.options = options
        self.group_offload = group_offload
        self._adapters = adapters
        self.base = _from_pretrained(folder, folders, options)
        if getattr(self.base, "motion_adapter", None) is not None:
            # Its weights were copied into the UNet; kept, they would be there twice.
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
            missing = [key for key, tensor in _tensors(module) if tensor.is_meta]
            if missing:
                raise LoadFailed(f"{folder.name}/{name}: the checkpoint lacks {missing[0]}")
            module.eval()
        if options.vae_tiling:
            self.base.vae.enable_tiling()
        if options.attention == "xformers":
            self.base.enable_xformers_memory_efficient_attention()
        super().__init__(modules, device)
        self._variants: dict[str, Any] = {}
        self._loras: OrderedDict[str, str] = OrderedDict()  # name → adapter name in the library
        self._loras_loaded = 0

    def place(self, host: HostMemory | None) -> None:
        """Bring the parts onto the device, as the base class says, or hook up their offloading."""
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
        self.set_loras(())  # adapters are small and quickly attached again
        super().park(blocks)

    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts that hold weights, by their name."""
        parts = {**self.base.components, "controlnet": self.controlnet}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def variant(self, kind: str) -> Any:
        """The pipeline for text, image, inpaint, control or image-to-video, of the same parts.

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
            field = {"inpaint": "mask", "control": "control_image"}.get(kind, "image")
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

    def set_loras(self, choices: tuple[LoraChoice, ...]) -> None:
        """Make exactly these adapters act; the weights themselves are never changed.

        Raises:
            InvalidRequest: one does not fit the model.

        """
        if not choices and not self._loras:
            return
        with GATE.exclusive():
            for index, choice in enumerate(choices):
                if choice.name in self._loras:
                    self._loras.move_to_end(choice.name)
                else:
                    self._load_lora(choice.name, f"loras[{index}].name")
            while len(self._loras) > max(MAX_LORAS, len(choices)):
                _, adapter = self._loras.popitem(last=False)
                self.base.delete_adapters(adapter)
            if not choices:
                # Also disabled adapters cost a call a layer: a request without any has none.
                self.base.unload_lora_weights()
                self._loras.clear()
                return
            names = [self._loras[choice.name] for choice in choices]
            self.base.set_adapters(names, [choice.weight for choice in choices])

    def _load_lora(self, name: str, param: str) -> None:
        path = lora_files(self.options.loras).get(name)
        if path is None:
            path = self._adapters[name] / LORA_FILE
        self._loras_loaded += 1
        adapter = f"lora{self._loras_loaded}"  # peft takes no dots in a name
        try:
            self.base.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=adapter, local_files_only=True
            )
            filled = sum(
                f".{adapter}." in key
                for module in self.modules().values()
                for key, _ in _tensors(module)
            )
            wanted = sum(".alpha" not in key for key in tensor_sizes([path]))
            if filled < wanted:
                raise ValueError(f"{wanted - filled} of its {wanted} tensors have no place")
        except Exception as error:
            if any(adapter in names for names in self.base.get_list_adapters().values()):
                self.base.delete_adapters(adapter)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidRequest(
                f"The LoRA {name!r} does not fit the model: {reason}", param=param
            ) from error
        self._loras[name] = adapter


class Run(TorchRun):
    """One request on one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        request: Any,
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(pipeline, shape, emit)
        self._pipeline = pipeline
        self._request: ImageRequest | VideoRequest = request

    def _run(self) -> None:
        pipeline, request = self._pipeline, self._request
        assert request.width is not None and request.height is not None
        check_size((request.width, request.height), family_of(type(pipeline.base).__name__))
        pipeline.set_loras(request.loras)
        pipe = pipeline.variant(self._kind())
        with GATE.step():
            self._emit(Progress(0.0))
            with self._measured():
                result = (
                    self._images(pipe, request)
                    if isinstance(request, ImageRequest)
                    else self._video(pipe, request)
                )
        self._emit(result)

    def _kind(self) -> str:
        """Which of the model's pipelines does it."""
        request = self._request
        if isinstance(request, VideoRequest):
            return "text" if request.image is None else "video-image"
        if request.mask is not None:
            return "inpaint"
        if request.images:
            return "image"
        return "text" if request.control_image is None else "control"

    def _images(self, pipe: Any, request: ImageRequest) -> ImageResult:
        """One after the other: each equals the one its seed gives alone, and memory stays flat."""
        assert request.seed is not None
        arguments = self._common(pipe) | self._conditions(pipe)
        images = []
        for index in range(request.n):
            # Partial images are of the first.
            previews = _previews(request, pipe) if index == 0 else {}
            callback = self._on_step(index, request.n, previews)
            images.append(
                pipe(
                    **arguments,
                    generator=torch.Generator("cpu").manual_seed(request.seed + index),
                    callback_on_step_end=callback,
                    output_type="pil",
                ).images[0]
            )
        return ImageResult(tuple(images), request.seed)

    def _conditions(self, pipe: Any) -> dict[str, Any]:
        request = self._request
        assert isinstance(request, ImageRequest)
        assert request.width is not None and request.height is not None
        size = (request.width, request.height)
        found: dict[str, Any] = {}
        if request.control_image is not None:
            found["image"] = _resized(request.control_image, size)
            found["controlnet_conditioning_scale"] = self._pipeline.options.control_scale
        elif request.images:
            images = [_resized(image, size) for image in request.images]
            found["image"] = images[0] if len(images) == 1 else images
            found["strength"] = request.strength
            if request.mask is not None:
                found["mask_image"] = _resized(request.mask, size)
        adapter = self._pipeline.options.ip_adapter
        if adapter is not None:
            # Its layers are part of the UNet and always run; at scale 0 they add nothing.
            reference = request.reference_image
            self._pipeline.base.set_ip_adapter_scale(adapter.scale if reference else 0.0)
            found["ip_adapter_image"] = reference or Image.new("RGB", (224, 224))
        accepted = inspect.signature(pipe.__call__).parameters
        return {name: value for name, value in found.items() if name in accepted}

    def _video(self, pipe: Any, request: VideoRequest) -> VideoResult:
        assert request.seed is not None and request.num_frames is not None and request.fps
        accepted = inspect.signature(pipe.__call__).parameters
        if request.image is None and "image" in accepted:
            raise InvalidRequest("This model starts from an image.", param="input_reference")
        arguments = self._common(pipe)
        step = family_of(type(pipe).__name__).frame_step
        # The model's frames come in ones and steps; what is too many is cut off.
        arguments["num_frames"] = -(-(request.num_frames - 1) // step) * step + 1
        assert request.width is not None and request.height is not None
        extras: dict[str, Any] = {"fps": request.fps, "frame_rate": request.fps}
        if request.image is not None:
            extras["image"] = _resized(request.image, (request.width, request.height))
        if request.motion is not None:
            if "motion_bucket_id" not in accepted:
                raise InvalidRequest("This model has no setting for motion.", param="motion")
            extras["motion_bucket_id"] = request.motion
        arguments |= {name: value for name, value in extras.items() if name in accepted}
        frames = pipe(
            **arguments,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=self._on_step(0, 1, {}),
            output_type="pil",
        ).frames[0]
        pixels = np.stack([np.asarray(frame) for frame in frames[: request.num_frames]])
        return VideoResult(pixels, request.fps, request.seed)

    def _common(self, pipe: Any) -> dict[str, Any]:
        request, options = self._request, self._pipeline.options
        accepted = inspect.signature(pipe.__call__).parameters
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "max_guidance_scale": request.guidance,
            **options.call,
        }
        if request.negative_prompt:
            if "negative_prompt" not in accepted:
                raise InvalidRequest(
                    "This model takes no negative prompt.", param="negative_prompt"
                )
            wanted["negative_prompt"] = request.negative_prompt
        return {name: value for name, value in wanted.items() if name in accepted}

    def _on_step(
        self, index: int, count: int, previews: Mapping[int, int]
    ) -> Callable[..., dict[str, Any]]:
        """Told by the pipeline after every step; `previews` has the partial image due at a step."""

        def on_step(
            pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            self.check()
            steps = max(1, getattr(pipe, "num_timesteps", 0) or self._request.steps or 1)
            self._emit(Progress((index + min(1.0, (step + 1) / steps)) / count))
            if step in previews:
                assert isinstance(self._request, ImageRequest)
                image = _decode(pipe, tensors["latents"], self._request)
                self._emit(PartialImage(previews[step], image))
            return {}

        return on_step


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


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _resized(image: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    assert image is not None
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _previews(request: ImageRequest, pipe: Any) -> dict[int, int]:
    """Step → number of the partial image due after it, evenly spread, none at the last step."""
    steps = request.steps or 1
    if (
        request.images
        and request.strength is not None
        and "strength" in inspect.signature(pipe.__call__).parameters
    ):
        steps = max(1, min(int(steps * request.strength), steps))
    count = min(request.partial_images, steps - 1)
    return {(number + 1) * steps // (count + 1) - 1: number for number in range(count)}


def _decode(pipe: Any, latents: Any, request: ImageRequest) -> Image.Image:
    """The image in the latents, as the pipeline itself would decode them at the end."""
    vae = pipe.vae
    config = vae.config
    if hasattr(pipe, "_unpack_latents"):  # FLUX keeps them as a sequence of patches
        latents = pipe._unpack_latents(
            latents, request.height, request.width, pipe.vae_scale_factor
        )
    upcast = vae.dtype == torch.float16 and getattr(config, "force_upcast", False)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        scale = torch.tensor(std).view(shape).to(latents) / config.scaling_factor
        latents = latents * scale + torch.tensor(mean).view(shape).to(latents)
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    if upcast:
        vae.to(torch.float32)
    try:
        pixels = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image
