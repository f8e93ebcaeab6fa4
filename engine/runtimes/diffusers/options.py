"""What the configuration says of an image or video model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from engine.requests import Quality
from engine.section import Section

MAX_STEPS = 500
"""Models are trained with 1000 time steps. Some schedulers fail near that many."""


TILE_SIDE = 512
"""The most pixels on each side that a VAE with tiling works on at once."""

OFFLOADED = ("transformer", "unet", "text_encoder")
"""Beginnings of the names of the parts that group offloading streams."""


class Profile(Section):
    """The work for an image or video of one quality."""

    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance: float = Field(ge=0, le=100)


class IpAdapter(Section):
    """The place of an IP-Adapter's weights, in the layout of the repository h94/IP-Adapter."""

    source: str
    subfolder: str = "models"
    weight_name: str = "ip-adapter_sd15.safetensors"
    scale: float = Field(default=0.6, ge=0, le=2)


Dtype = Literal["float32", "bfloat16", "float16"]


class DiffusersOptions(Section):
    """Options of an image or video model."""

    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype | None = None
    """The type of the VAE, if it differs. Wan's is meant to run in float32."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, more time, and seams in some images."""
    variant: str | None = None
    """`fp16` takes the files named `*.fp16.safetensors`."""
    revision: str | None = None
    pipeline: str | None = None
    """The pipeline class, if it is not that of `model_index.json`."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """`class` and any of its settings. The others stay as the checkpoint has them."""
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
    """How far an edit or variation leaves its image, for requests that do not say."""
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
    """The image model that makes the first frame of videos whose request brings none."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call of the pipeline, such as `decode_chunk_size`."""

    def profile(self, quality: Quality) -> Profile:
        """The profile of a quality; the default if that one is not configured."""
        chosen = None if quality is Quality.AUTO else getattr(self, quality.value)
        return chosen or self.default
