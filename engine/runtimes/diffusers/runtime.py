"""diffusers: image and video models.

Any pipeline folder or hub repository. What differs between families is data: the table
`FAMILIES` for what their code demands of sizes and frame counts, the model's options for
scheduler, steps, guidance and defaults. Nothing here imports diffusers before `start`; the
pipelines themselves are in `pipeline`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from engine.config import ModelConfig, Section
from engine.errors import InvalidRequest, LoadFailed
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.memory.block import Block, Estimate
from engine.memory.device import Device
from engine.model_folder import local_folder, present_folder
from engine.process.gate import GATE
from engine.requests import (
    ImageOperation,
    ImageRequest,
    Quality,
    Request,
    VideoRequest,
)
from engine.runtimes.base import Prepared
from engine.runtimes.common.thread_run import Emit, ThreadRun
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime

if TYPE_CHECKING:
    from engine.runtimes.diffusers.pipeline import Pipeline  # noqa: F401 - used in a string

DECODER_COPIES = 3
"""Tensors of full size alive at once in a VAE decoder's last block: input, normalised, output."""

MAX_SEED = 2**32 - 1

MAX_STEPS = 500
"""Models are trained with 1000 time steps; some schedulers fail near that many."""

ImageOrVideo = TypeVar("ImageOrVideo", ImageRequest, VideoRequest)


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of a family of pipelines demands; diffusers checks some of it, and late."""

    size_multiple: int = 8
    """Width and height must be multiples of this many pixels."""
    frame_step: int = 1
    """The frames that can be made are 1, 1 + step, 1 + 2 · step, …; others are cut from more."""
    frames_at_once: int | None = None
    """Frames that the VAE decodes together; None: all."""
    decoder_scale: int = 1
    """How much smaller than the image, on each side, the widest block of the VAE's decoder is."""
    many_images: bool = False
    """Whether an edit may start from several images."""


FAMILIES = {
    "AnimateDiff": Family(),
    "CogVideoX": Family(size_multiple=16, frame_step=4, frames_at_once=8),
    "Flux2": Family(size_multiple=16, many_images=True),
    "Flux": Family(size_multiple=16),
    "HunyuanVideo": Family(size_multiple=16, frame_step=4, frames_at_once=16),
    "LTX": Family(size_multiple=32, frame_step=8, decoder_scale=4),
    "QwenImageEditPlus": Family(size_multiple=16, many_images=True),
    "StableVideoDiffusion": Family(size_multiple=64),
    "Wan": Family(size_multiple=16, frame_step=4, frames_at_once=4),
}
"""By the beginning of the pipeline's class name. Sizes: VAE scale × patch (for Stable Video
Diffusion × the UNet's own scale, as it has no odd sizes inside); frames: the VAE's compression in
time, and how its code batches them; LTX's decoder leaves a patch of 4 × 4 to its last layer."""

CONFIG_FILES = ("*.json", "*.txt", "*.model")
"""What a pipeline needs beside the weights of its parts. Repositories hold the same weights once
more in one file at their root, for other programs: more than the parts together."""

OFFLOADED = ("transformer", "unet", "text_encoder")
"""Beginnings of the names of the parts that group offloading streams."""

TILE_PIXELS = 512 * 512
"""What a VAE with tiling decodes at once, at most."""


class Profile(Section):
    """How much work an image or video of one quality is."""

    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance: float = Field(ge=0, le=100)


class IpAdapter(Section):
    """Where an IP-Adapter's weights are, laid out as in the repository h94/IP-Adapter."""

    source: str
    subfolder: str = "models"
    weight_name: str = "ip-adapter_sd15.safetensors"
    scale: float = Field(default=0.6, ge=0, le=2)


Dtype = Literal["float32", "bfloat16", "float16"]


class DiffusersOptions(Section):
    """Options of an image or video model."""

    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype | None = None
    """Of the VAE alone, where it needs more; Wan's is meant to run in float32."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, more time, and seams where a model is unlucky."""
    variant: str | None = None
    """`fp16` takes the files named `*.fp16.safetensors`."""
    revision: str | None = None
    pipeline: str | None = None
    """The pipeline class, where `model_index.json` names another than is wanted."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """`class` and any of its settings; the rest is kept as the checkpoint has it."""
    components: dict[str, str] = Field(default_factory=dict)
    """Sources of parts that come from elsewhere, such as `motion_adapter`."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    offload: Literal["auto", "none", "group"] = "auto"
    """`group` keeps denoiser and text encoders in host memory and streams their layers (CUDA).

    `auto` does so for a model that is larger than everything the engine may use of the GPU.
    """
    width: int = Field(default=1024, ge=16)
    height: int = Field(default=1024, ge=16)
    max_pixels: int = Field(default=2048 * 2048, ge=256)
    """Of one image or frame."""
    max_n: int = Field(default=10, ge=1)
    num_frames: int = Field(default=16, ge=1)
    max_frames: int = Field(default=256, ge=1)
    fps: int = Field(default=8, ge=1, le=120)
    strength: float = Field(default=0.8, gt=0, le=1)
    """How far an edit or variation leaves its image where the request does not say."""
    default: Profile = Profile(steps=30, guidance=7.5)
    low: Profile | None = None
    medium: Profile | None = None
    high: Profile | None = None
    loras: Path | None = None
    """A folder of adapters: `NAME.safetensors`, or `NAME/pytorch_lora_weights.safetensors`."""
    lora_sources: dict[str, str] = Field(default_factory=dict)
    """Further adapters by name, each a folder or a hub repository."""
    controlnet: str | None = None
    """Source of the ControlNet that follows a request's control image."""
    control_scale: float = Field(default=1.0, ge=0, le=2)
    ip_adapter: IpAdapter | None = None
    first_frame_model: str | None = None
    """The image model that makes the first frame where a request for a video brings none."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call of the pipeline, such as `decode_chunk_size`."""

    def profile(self, quality: Quality) -> Profile:
        """The profile of a quality; one that is not configured is the default."""
        chosen = None if quality is Quality.AUTO else getattr(self, quality.value)
        return chosen or self.default


def family_of(pipeline_class: str) -> Family:
    """What a pipeline class demands."""
    for beginning, family in FAMILIES.items():
        if pipeline_class.startswith(beginning):
            return family
    return Family()


def check_size(size: tuple[int, int], family: Family) -> None:
    """Refuse a size that the family cannot do.

    Raises:
        InvalidRequest: naming `size`.

    """
    multiple = family.size_multiple
    if any(side < multiple or side % multiple for side in size):
        raise InvalidRequest(
            f"Width and height must be multiples of {multiple} pixels for this model,"
            f" not {_size(size)}.",
            param="size",
        )


LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_files(folder: Path | None) -> dict[str, Path]:
    """The adapters of a folder by name."""
    if folder is None or not folder.is_dir():
        return {}
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for path in sorted(folder.glob(f"*/{LORA_FILE}")):
        found[path.parent.name] = path
    return found


def ip_adapter_files(adapter: IpAdapter) -> tuple[str, ...]:
    """What is read of an IP-Adapter's repository, which holds those of many models."""
    encoder = f"{adapter.subfolder}/image_encoder"
    weights = f"{adapter.subfolder}/{adapter.weight_name}"
    return (weights, f"{encoder}/*.safetensors", f"{encoder}/*.json")


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
            return self._prepare_image(model, request)
        if model.task == "video" and isinstance(request, VideoRequest):
            return self._prepare_video(model, request)
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )

    def _prepare_image(self, model: ModelConfig, request: ImageRequest) -> Prepared:
        options: DiffusersOptions = model.options
        family = self._family(model)
        if not 1 <= request.n <= options.max_n:
            raise InvalidRequest(f"n must be from 1 to {options.max_n}.", param="n")
        if request.operation is not ImageOperation.GENERATION and not request.images:
            raise InvalidRequest("An image to start from is needed.", param="image")
        if len(request.images) > 1 and not family.many_images:
            raise InvalidRequest(
                f"The model {model.id!r} starts from one image, not {len(request.images)}.",
                param="image",
            )
        if request.mask is not None and not request.images:
            raise InvalidRequest("A mask needs an image.", param="mask")
        if request.mask is not None and request.mask.size != request.images[0].size:
            raise InvalidRequest(
                f"The mask is {_size(request.mask.size)} pixels, the image"
                f" {_size(request.images[0].size)}.",
                param="mask",
            )
        if request.control_image is not None and options.controlnet is None:
            raise InvalidRequest(
                f"The model {model.id!r} has no ControlNet.", param="control_image"
            )
        if request.control_image is not None and request.images:
            raise InvalidRequest("Give an image or a control image.", param="control_image")
        if request.reference_image is not None and options.ip_adapter is None:
            raise InvalidRequest(
                f"The model {model.id!r} has no IP-Adapter.", param="reference_image"
            )
        if request.images and request.width is None and request.height is None:
            width, height = _fit(request.images[0].size, family.size_multiple, options.max_pixels)
            request = replace(request, width=width, height=height)
        filled = self._fill(model, request, family)
        if filled.images:
            filled = self._fill_strength(request, filled, options)
        shape = f"{filled.operation}-{filled.width}x{filled.height}"
        parts = (("mask", filled.mask), ("partial", filled.partial_images),
                 ("control", filled.control_image), ("image", filled.images))  # fmt: skip
        shape += "".join(f"-{name}" for name, there in parts if there)
        return self._prepared(model, filled, shape, frames=1)

    def _fill_strength(
        self, asked: ImageRequest, filled: ImageRequest, options: DiffusersOptions
    ) -> ImageRequest:
        strength = options.strength if filled.strength is None else filled.strength
        if not 0 < strength <= 1:
            raise InvalidRequest("strength must be above 0, at most 1.", param="strength")
        # An image-to-image run takes steps × strength steps and fails at none.
        least = ceil(1 / strength)
        assert filled.steps is not None
        if asked.steps is not None and asked.steps < least:
            raise InvalidRequest(
                f"With a strength of {strength} it takes at least {least} steps.", param="steps"
            )
        return replace(filled, strength=strength, steps=max(filled.steps, least))

    def _prepare_video(self, model: ModelConfig, request: VideoRequest) -> Prepared:
        options: DiffusersOptions = model.options
        family = self._family(model)
        fps = options.fps if request.fps is None else request.fps
        if not 1 <= fps <= 120:
            raise InvalidRequest("fps must be from 1 to 120.", param="fps")
        param, frames = "num_frames", request.num_frames
        if frames is None and request.seconds is not None:
            param, frames = "seconds", round(request.seconds * fps)
        if frames is None:
            frames = options.num_frames
        if not 1 <= frames <= options.max_frames:
            raise InvalidRequest(
                f"The model {model.id!r} makes 1 to {options.max_frames} frames"
                f" ({options.max_frames / fps:g} seconds at {fps} a second), not {frames}.",
                param=param,
            )
        if request.motion is not None and not 0 <= request.motion <= 255:
            raise InvalidRequest("motion must be from 0 to 255.", param="motion")
        filled = replace(
            self._fill(model, request, family), fps=fps, num_frames=frames, seconds=frames / fps
        )
        shape = f"video-{filled.width}x{filled.height}x{frames}"
        if filled.image is not None:
            shape += "-image"
        return self._prepared(model, filled, shape, frames=frames)

    def _fill(self, model: ModelConfig, request: ImageOrVideo, family: Family) -> ImageOrVideo:
        """Size, steps, guidance and seed, checked; and the adapters."""
        options: DiffusersOptions = model.options
        width = options.width if request.width is None else request.width
        height = options.height if request.height is None else request.height
        check_size((width, height), family)
        if width * height > options.max_pixels:
            raise InvalidRequest(
                f"{_size((width, height))} is more than the {options.max_pixels} pixels that the"
                f" model {model.id!r} may make.",
                param="size",
            )
        profile = options.profile(request.quality)
        steps = profile.steps if request.steps is None else request.steps
        if not 1 <= steps <= MAX_STEPS:
            raise InvalidRequest(f"steps must be from 1 to {MAX_STEPS}.", param="steps")
        guidance = profile.guidance if request.guidance is None else request.guidance
        if not 0 <= guidance <= 100:
            raise InvalidRequest("guidance must be from 0 to 100.", param="guidance")
        seed = random.randrange(MAX_SEED) if request.seed is None else request.seed
        if not 0 <= seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be from 0 to {MAX_SEED}.", param="seed")
        self._check_loras(model, request)
        return replace(
            request, width=width, height=height, steps=steps, guidance=guidance, seed=seed
        )

    def _check_loras(self, model: ModelConfig, request: ImageRequest | VideoRequest) -> None:
        if not request.loras:
            return
        known = lora_files(model.options.loras).keys() | model.options.lora_sources.keys()
        for index, choice in enumerate(request.loras):
            if choice.name not in known:
                there = ", ".join(sorted(known)) or "none"
                raise InvalidRequest(
                    f"The model {model.id!r} has no LoRA {choice.name!r}; there is {there}.",
                    param=f"loras[{index}].name",
                )
            if not -10 <= choice.weight <= 10:
                raise InvalidRequest(
                    "The weight of a LoRA must be from -10 to 10.", param=f"loras[{index}].weight"
                )
        names = [choice.name for choice in request.loras]
        if len(set(names)) < len(names):
            raise InvalidRequest("A LoRA is named twice.", param="loras")

    def _prepared(
        self, model: ModelConfig, request: ImageRequest | VideoRequest, shape: str, *, frames: int
    ) -> Prepared:
        """The request with an estimate from the decoder, whose last block is the peak."""
        options: DiffusersOptions = model.options
        assert request.width is not None and request.height is not None
        family = self._family(model)
        at_once = int(options.call.get("decode_chunk_size", family.frames_at_once or frames))
        pixels = request.width * request.height
        decoded = min(pixels, TILE_PIXELS) if options.vae_tiling else pixels
        item_bytes = DTYPE_BYTES[options.vae_dtype or options.dtype]
        widest = self._decoder_channels(model) * item_bytes * DECODER_COPIES
        working = decoded * min(frames, at_once) * widest // family.decoder_scale**2
        working += pixels * frames * 3
        assert request.guidance is not None
        if request.guidance > 1:
            shape += "-guided"  # the denoiser then has twice the batch
        if request.loras:
            shape += "-" + "+".join(sorted(choice.name for choice in request.loras))
        return Prepared(request, None, working_bytes=working, shape=shape)

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
        return [path for folder in parts for path in _weight_files(folder, variant)]

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
                tensors = tensor_sizes(_weight_files(path, options.variant))
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


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The component's safetensors files, of the variant where it has it."""
    files = sorted(folder.glob("*.safetensors"))
    varied = [path for path in files if variant and f".{variant}." in path.name]
    plain = [path for path in files if path.name.count(".") == 1]
    return varied or plain or files


def _fit(size: tuple[int, int], multiple: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of the family no larger than the image and than allowed."""
    width, height = size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    return (
        max(multiple, int(width * scale) // multiple * multiple),
        max(multiple, int(height * scale) // multiple * multiple),
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
