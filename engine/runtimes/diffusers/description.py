"""The facts about a pipeline that its small files have, before any part is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model_index.json"
VAE_CONFIG_FILE = "vae/config.json"
UNET_CONFIG_FILE = "unet/config.json"
TRANSFORMER_CONFIG_FILE = "transformer/config.json"
DESCRIPTION_FILES = (INDEX_FILE, VAE_CONFIG_FILE, UNET_CONFIG_FILE, TRANSFORMER_CONFIG_FILE)

USUAL_DECODER_CHANNELS = 256
"""As in SDXL and FLUX."""


@dataclass(frozen=True, slots=True)
class PipelineDescription:
    """The facts that the checks of a request need. The defaults are for a pipeline not here yet."""

    pipeline_class: str = ""
    decoder_channels: int = USUAL_DECODER_CHANNELS
    """Of the VAE at full size."""
    guidance_is_input: bool | None = None
    """Whether the denoiser takes the guidance scale as an input; None: its files do not say."""
    is_distilled: bool = False
    """Whether it was trained to need no guidance, as the index of FLUX.2 klein says."""
    expands_timesteps: bool = False
    """Whether a Wan takes a first frame as it is, as Wan 2.2's model of 5 B does."""
    size_multiple: int | None = None
    """Pixels that one token stands for on each side; None: its files do not say."""

    @classmethod
    def read(cls, folder: Path) -> PipelineDescription:
        """Read a folder. Facts of missing or damaged files keep their default."""
        index = _document(folder / INDEX_FILE)
        vae = _document(folder / VAE_CONFIG_FILE)
        guidance_is_input = None
        unet, transformer = (
            _document(folder / name) for name in (UNET_CONFIG_FILE, TRANSFORMER_CONFIG_FILE)
        )
        if unet:
            guidance_is_input = unet.get("time_cond_proj_dim") is not None
        elif "guidance_embeds" in transformer:
            guidance_is_input = bool(transformer["guidance_embeds"])
        return cls(
            pipeline_class=str(index.get("_class_name", "")),
            decoder_channels=_decoder_channels(vae),
            guidance_is_input=guidance_is_input,
            is_distilled=index.get("is_distilled") is True,
            expands_timesteps=index.get("expand_timesteps") is True,
            size_multiple=_size_multiple(vae, transformer),
        )


def _decoder_channels(vae: Mapping[str, Any]) -> int:
    """Its second block's channels come in at full size, its first's go out.

    Wan's has a base and its multiples. The decoder of Wan 2.2 leaves a patch of 2 x 2 pixels to
    its last layer, so that a quarter of its channels falls on each pixel.
    """
    try:
        if "dim_mult" in vae:
            base = vae.get("decoder_base_dim") or vae["base_dim"]
            return int(base * vae["dim_mult"][1]) // (vae.get("patch_size") or 1) ** 2
        channels = vae["block_out_channels"]
        return int(channels[min(1, len(channels) - 1)])
    except (ValueError, KeyError, TypeError, IndexError):
        return USUAL_DECODER_CHANNELS


def _size_multiple(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int | None:
    """The scale of a video's VAE times the width of the denoiser's patch."""
    try:
        return int(vae["scale_factor_spatial"]) * int(transformer["patch_size"][-1])
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _document(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}
