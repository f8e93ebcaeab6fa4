"""The starter models that make images: Stable Diffusion 1.5, SDXL and FLUX.1.

The schedulers are those of the real repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
)

from engine.starters.diffusion.modules import ModuleWeights
from engine.starters.diffusion.parts import (
    SD_BETAS,
    TEXT_WIDTH,
    clip_text,
    clip_tokenizer,
    sd15_parts,
    sd_vae,
    sdxl_parts,
    t5,
    t5_tokenizer,
)
from engine.starters.diffusion.pipeline_folder import write_pipeline


def _write_sd15(folder: Path) -> None:
    scheduler = PNDMScheduler(
        **SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    components = {
        **sd15_parts(ModuleWeights(15)),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_pipeline(folder, "StableDiffusionPipeline", components, requires_safety_checker=False)


def _write_sdxl(folder: Path, *, seed: int, scheduler: Callable[..., Any], spacing: str) -> None:
    components = {
        **sdxl_parts(ModuleWeights(seed)),
        "scheduler": scheduler(**SD_BETAS, steps_offset=1, timestep_spacing=spacing),
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_pipeline(
        folder, "StableDiffusionXLPipeline", components, force_zeros_for_empty_prompt=True
    )


def _write_flux(folder: Path, *, seed: int, distilled: bool) -> None:
    """FLUX.1: schnell where it is distilled to few steps, otherwise dev."""
    weights = ModuleWeights(seed)
    vae = partial(
        sd_vae,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = partial(
        FluxTransformer2DModel,
        in_channels=64,  # 16 latents, packed two by two
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=not distilled,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(clip_text),
        "text_encoder_2": weights.build(t5),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer("T5TokenizerFast", 512, fast=True),
        "transformer": weights.build(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
            shift=1.0 if distilled else 3.0,
            use_dynamic_shifting=not distilled,
        ),
    }
    write_pipeline(folder, "FluxPipeline", components)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "tiny-sdxl-turbo": partial(
            _write_sdxl, seed=1, scheduler=EulerAncestralDiscreteScheduler, spacing="trailing"
        ),
        "tiny-sdxl": partial(
            _write_sdxl, seed=10, scheduler=EulerDiscreteScheduler, spacing="leading"
        ),
        "tiny-sd15": _write_sd15,
        "tiny-flux-schnell": partial(_write_flux, seed=3, distilled=True),
        "tiny-flux-dev": partial(_write_flux, seed=4, distilled=False),
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
