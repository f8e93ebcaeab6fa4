"""The starter models that make images: Stable Diffusion 1.5, SDXL, FLUX.1, FLUX.2, Z-Image.

The schedulers are those of the real repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PNDMScheduler,
    ZImageTransformer2DModel,
)
from transformers import Qwen3ForCausalLM, Qwen3Model

from engine.starters.diffusion.modules import ModuleWeights
from engine.starters.diffusion.parts import (
    SD_BETAS,
    TEXT_WIDTH,
    clip_text,
    clip_tokenizer,
    qwen3,
    sd15_parts,
    sd_vae,
    sdxl_parts,
    t5,
    t5_tokenizer,
)
from engine.starters.diffusion.pipeline_folder import Files, write_pipeline
from engine.starters.diffusion.prompt_tokenizers import write_chat_tokenizer


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


_FLUX_VAE = partial(
    sd_vae,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
"""FLUX.1's, which Z-Image took over."""


def _flux_scheduler(*, distilled: bool) -> FlowMatchEulerDiscreteScheduler:
    """Of schnell where it is distilled, otherwise of dev; FLUX.2 klein has dev's."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
        shift=1.0 if distilled else 3.0,
        use_dynamic_shifting=not distilled,
    )


def _write_flux(folder: Path, *, seed: int, distilled: bool) -> None:
    """FLUX.1: schnell where it is distilled to few steps, otherwise dev."""
    weights = ModuleWeights(seed)
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
        "vae": weights.build_vae(_FLUX_VAE, gain=0.8),
        "text_encoder": weights.build(clip_text),
        "text_encoder_2": weights.build(t5),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer("T5TokenizerFast", 512, fast=True),
        "transformer": weights.build(transformer),
        "scheduler": _flux_scheduler(distilled=distilled),
    }
    write_pipeline(folder, "FluxPipeline", components)


def _write_flux2_klein(folder: Path) -> None:
    weights = ModuleWeights(31)
    channels = 4
    make_vae = partial(
        AutoencoderKLFlux2,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
    )
    vae = weights.build_vae(make_vae, gain=0.8)
    # The means of the latents are buffers, which the real checkpoint fills too.
    vae.bn.running_mean.copy_(torch.from_numpy(weights.normal(4 * channels, std=0.1)))
    vae.bn.num_batches_tracked.fill_(1)
    transformer = partial(
        Flux2Transformer2DModel,
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=3 * TEXT_WIDTH,
        guidance_embeds=False,
    )
    components = {
        "vae": vae,
        # The pipeline takes the states after 9, 18 and 27 layers.
        "text_encoder": weights.build(partial(qwen3, Qwen3ForCausalLM, layers=28)),
        "tokenizer": Files("PreTrainedTokenizerFast", write_chat_tokenizer),
        "transformer": weights.build(transformer),
        "scheduler": _flux_scheduler(distilled=False),
    }
    write_pipeline(folder, "Flux2KleinPipeline", components, is_distilled=True)


def _write_z_image(folder: Path) -> None:
    weights = ModuleWeights(33)
    transformer = partial(
        ZImageTransformer2DModel,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )
    components = {
        "vae": weights.build_vae(_FLUX_VAE, gain=0.8),
        "text_encoder": weights.build(partial(qwen3, Qwen3Model, layers=3)),
        "tokenizer": Files("PreTrainedTokenizerFast", write_chat_tokenizer),
        "transformer": weights.build(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    write_pipeline(folder, "ZImagePipeline", components)


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
        "tiny-flux2-klein": _write_flux2_klein,
        "tiny-z-image": _write_z_image,
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
