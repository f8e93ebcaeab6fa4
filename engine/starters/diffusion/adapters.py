"""The starter models that are added to a pipeline: LoRAs, ControlNets and an IP-Adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import nn

from engine.starters.diffusion.modules import ModuleWeights, construct
from engine.starters.diffusion.parts import (
    TEXT_WIDTH,
    clip_text,
    clip_vision,
    sd15_unet,
    sdxl_unet,
)
from engine.starters.diffusion.pipeline_folder import save
from engine.starters.tensors import Tensors, write_tensors

_LORA_RANK = 4
_LORA_TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_LORA_KEYS = {
    "unet": "unet.{}.lora.{}.weight",
    "text_encoder": "text_encoder.text_model.{}.lora_linear_layer.{}.weight",
}
"""The names that diffusers' training scripts give a LoRA's tensors."""


def _write_lora(folder: Path, parts: Mapping[str, Callable[[], Any]], *, seed: int) -> None:
    """A LoRA on all attention of the given parts of a pipeline.

    A real one changes each projection a little; this one by as much as the projection itself.
    """
    weights = ModuleWeights(seed)
    tensors: Tensors = {}
    for part, make in parts.items():
        for name, layer in construct(make).named_modules():
            if name.endswith(_LORA_TARGETS[part]):
                down = weights.linear(_LORA_RANK, layer.in_features)
                up = weights.linear(layer.out_features, _LORA_RANK)
                tensors[_LORA_KEYS[part].format(name, "down")] = down
                tensors[_LORA_KEYS[part].format(name, "up")] = up
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors)


def _write_controlnet(folder: Path, unet: Callable[[], Any], *, seed: int) -> None:
    def make() -> Any:
        return ControlNetModel.from_unet(
            unet(),
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            load_weights_from_unet=False,
        )

    controlnet = ModuleWeights(seed).build(make)
    with torch.no_grad():
        # Eight convolutions with no norm, and each activation halves its input: without this,
        # nothing of the control image would arrive.
        for each in controlnet.controlnet_cond_embedding.modules():
            if isinstance(each, nn.Conv2d):
                each.weight.mul_(2.0)
    save(controlnet, folder)


def _write_ip_adapter(folder: Path) -> None:
    """The layout of the repository h94/IP-Adapter."""
    weights = ModuleWeights(4)
    models = folder / "models"
    save(weights.build(clip_vision), models / "image_encoder")
    image_tokens = 4
    tensors = {
        "image_proj.proj.weight": weights.linear(image_tokens * TEXT_WIDTH, TEXT_WIDTH),
        "image_proj.proj.bias": weights.normal(image_tokens * TEXT_WIDTH, std=0.05),
        "image_proj.norm.weight": np.ones(TEXT_WIDTH, np.float32),
        "image_proj.norm.bias": weights.normal(TEXT_WIDTH, std=0.05),
    }
    unet = construct(sd15_unet)
    # The index counts all attention, including self-attention (`attn1`), which has no weights.
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for projection in ("to_k", "to_v"):
                layer = attention.get_submodule(projection)
                tensors[f"ip_adapter.{index}.{projection}_ip.weight"] = weights.linear(
                    layer.out_features, layer.in_features
                )
    write_tensors(models / "ip-adapter_sd15.safetensors", tensors)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "tiny-lora-sd15": partial(_write_lora, parts={"unet": sd15_unet}, seed=5),
        "tiny-lora-sd15-b": partial(
            _write_lora, parts={"unet": sd15_unet, "text_encoder": clip_text}, seed=6
        ),
        "tiny-lora-sdxl": partial(_write_lora, parts={"unet": sdxl_unet}, seed=7),
        "tiny-controlnet-sd15": partial(_write_controlnet, unet=sd15_unet, seed=8),
        "tiny-controlnet-sdxl": partial(_write_controlnet, unet=sdxl_unet, seed=11),
        "tiny-ip-adapter-sd15": _write_ip_adapter,
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
