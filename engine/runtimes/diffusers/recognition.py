"""Whether a repository of the hub holds a pipeline, and the entry for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import LoadFailed
from engine.files.hub.repository import Repository
from engine.runtimes.diffusers.description import INDEX_FILE, VAE_CONFIG_FILE
from engine.runtimes.recognised import Recognised

VIDEO_PIPELINES = re.compile(
    r"AnimateDiff|Allegro|CogVideoX|Cosmos|EasyAnimate|HunyuanVideo|I2VGen|Latte|LTX|Mochi|SkyReels|"
    r"StableVideoDiffusion|TextToVideo|VideoTo|Wan"
)
"""Parts of the class names of the pipelines that make videos."""


VIDEO_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "CogVideoX": {"width": 720, "height": 480, "num_frames": 49, "max_frames": 49, "fps": 8},
    "HunyuanVideo": {"width": 512, "height": 320, "num_frames": 61, "max_frames": 129, "fps": 24},
    "LTX": {"width": 704, "height": 480, "num_frames": 161, "max_frames": 257, "fps": 24},
    "StableVideoDiffusion": {
        "width": 1024,
        "height": 576,
        "num_frames": 25,
        "max_frames": 25,
        "fps": 7,
    },
    "Wan": {
        "vae_dtype": "float32",
        "width": 832,
        "height": 480,
        "num_frames": 81,
        "max_frames": 81,
        "fps": 16,
    },
}
"""By the beginning of the pipeline's class: the shape of the models' training, as their cards say
and the shipped configurations have it."""


WAN_22_SHAPE = {"width": 1280, "height": 704, "num_frames": 121, "max_frames": 121, "fps": 24}
"""That of Wan 2.2's model of 5 B, whose index says that it expands time steps."""


def recognise_pipeline(repository: Repository) -> Recognised | None:
    """The entry for a repository with `model_index.json`; None for any other.

    Raises:
        LoadFailed: the index names no pipeline.

    """
    if INDEX_FILE not in repository.paths:
        return None
    index = repository.json(INDEX_FILE)
    name = str(index.get("_class_name", "")) if isinstance(index, dict) else ""
    if not name.endswith("Pipeline"):
        raise LoadFailed(f"{repository.name}: model_index.json names no pipeline")
    options: dict[str, Any] = {"pipeline": name}
    half = _has_variant(repository.paths, "fp16")
    # float16 wherever a repository has such files: they are meant for it, and half of the download.
    options["dtype"] = "float16" if half else "bfloat16"
    if half:
        options["variant"] = "fp16"
    if VIDEO_PIPELINES.search(name):
        shape = next((each for key, each in VIDEO_SHAPES.items() if name.startswith(key)), {})
        if index.get("expand_timesteps"):
            shape = {**shape, **WAN_22_SHAPE}
        return Recognised("diffusers", "video", {**options, **shape})
    options |= _image_options(repository, index)
    return Recognised("diffusers", "image", options)


def _has_variant(paths: frozenset[str], variant: str) -> bool:
    """Whether every part with weights has them in that variant too."""
    parts = {path.partition("/")[0] for path in paths if path.endswith(".safetensors")}
    parts = {part for part in parts if not part.endswith(".safetensors")}
    varied = {
        path.partition("/")[0]
        for path in paths
        if path.endswith(".safetensors") and f".{variant}" in path
    }
    return bool(parts) and parts <= varied


def _image_options(repository: Repository, index: Mapping[str, Any]) -> dict[str, Any]:
    """Size and steps, if the files or the name show them."""
    options: dict[str, Any] = {}
    if "unet/config.json" in repository.paths and VAE_CONFIG_FILE in repository.paths:
        unet, vae = repository.json("unet/config.json"), repository.json(VAE_CONFIG_FILE)
        scale = 2 ** (len(vae.get("block_out_channels") or (0, 0, 0, 0)) - 1)
        if isinstance(sample := unet.get("sample_size"), int):
            options |= {"width": sample * scale, "height": sample * scale}
    few_steps = None
    is_turbo = "turbo" in repository.name.lower()
    if index.get("is_distilled"):
        few_steps = {"steps": 4, "guidance": 1.0}
    elif is_turbo and index.get("_class_name") == "ZImagePipeline":
        few_steps = {"steps": 9, "guidance": 0.0}
    elif "transformer/config.json" in repository.paths:
        transformer = repository.json("transformer/config.json")
        if transformer.get("guidance_embeds") is False and "schnell" in repository.name.lower():
            few_steps = {"steps": 4, "guidance": 0.0}
    elif is_turbo:
        few_steps = {"steps": 2, "guidance": 0.0}
        options["scheduler"] = {
            "class": "EulerAncestralDiscreteScheduler",
            "timestep_spacing": "trailing",
        }
    if few_steps is not None:
        options["default"] = few_steps
    return options
