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
        name = str(index.get("_class_name", ""))
        return cls(name, _decoder_channels(vae), guidance_is_input)


def _decoder_channels(vae: Mapping[str, Any]) -> int:
    """Its second block's channels come in at full size, its first's go out."""
    try:
        channels = vae["block_out_channels"]
        return int(channels[min(1, len(channels) - 1)])
    except (ValueError, KeyError, TypeError, IndexError):
        return USUAL_DECODER_CHANNELS


def _document(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}
