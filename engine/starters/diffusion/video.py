"""The starter models that make videos, each with the parts and file layout of its real repository.

The schedulers are those of the real repositories. Where a value is not plain, the line says
whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from engine.starters.diffusion.modules import ModuleWeights
from engine.starters.diffusion.parts import (
    SD_BETAS,
    TEXT_WIDTH,
    clip_text,
    clip_tokenizer,
    clip_vision,
    llama,
    sd15_parts,
    sdxl_parts,
    t5,
    t5_tokenizer,
    write_image_processor,
)
from engine.starters.diffusion.pipeline_folder import Files, write_pipeline
from engine.starters.diffusion.prompt_tokenizers import write_llama_tokenizer

_TEMPORAL_WIDTH = 32
"""Stable Video Diffusion's modules normalise in 32 groups, so they cannot be narrower."""


def _write_svd(folder: Path) -> None:
    weights = ModuleWeights(25)
    vae = partial(
        AutoencoderKLTemporalDecoder,
        block_out_channels=(_TEMPORAL_WIDTH,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=768,
        scaling_factor=0.18215,
    )
    time_width = 32
    unet = partial(
        UNetSpatioTemporalConditionModel,
        sample_size=96,
        num_frames=14,
        block_out_channels=(_TEMPORAL_WIDTH,) * 2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=TEXT_WIDTH,
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=3 * time_width,  # fps, motion bucket, noise
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "image_encoder": weights.build(clip_vision),
        "unet": weights.build(unet),
        "feature_extractor": Files("CLIPImageProcessor", write_image_processor),
        "scheduler": EulerDiscreteScheduler(
            **SD_BETAS,
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
    }
    write_pipeline(folder, "StableVideoDiffusionPipeline", components)


def _motion_adapter(**settings: Any) -> Any:
    return MotionAdapter(
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=32,
        **settings,
    )


def _animatediff_scheduler() -> Any:
    """The scheduler that diffusers' AnimateDiff page recommends."""
    return DDIMScheduler(
        **{**SD_BETAS, "beta_schedule": "linear"},
        clip_sample=False,
        timestep_spacing="linspace",
        steps_offset=1,
    )


def _write_animatediff(folder: Path) -> None:
    weights = ModuleWeights(16)
    components = {
        **sd15_parts(weights),
        "motion_adapter": weights.build(
            partial(_motion_adapter, block_out_channels=(16, 16, 32, 32))
        ),
        "scheduler": _animatediff_scheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_pipeline(folder, "AnimateDiffPipeline", components)


def _write_animatediff_sdxl(folder: Path) -> None:
    weights = ModuleWeights(17)
    adapter = partial(_motion_adapter, block_out_channels=(16, 32, 32), use_motion_mid_block=False)
    components = {
        **sdxl_parts(weights),
        "motion_adapter": weights.build(adapter),
        "scheduler": _animatediff_scheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }
    write_pipeline(folder, "AnimateDiffSDXLPipeline", components, force_zeros_for_empty_prompt=True)


_WAN_22_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "decoder_base_dim": 8,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,  # three colours of a patch of 2 x 2 pixels
        "out_channels": 12,
        "scale_factor_spatial": 16,
    }
)
"""The difference of Wan 2.2's VAE: it has twice the scale, as its pixels are patches."""


def _write_wan(folder: Path, *, seed: int, from_image: bool) -> None:
    """Wan 2.1, or where it may start from an image, Wan 2.2's model of 5 B."""
    weights = ModuleWeights(seed)
    vae = partial(
        AutoencoderKLWan,
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **(_WAN_22_VAE if from_image else {}),
    )
    transformer = partial(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=64,
        freq_dim=64,
        text_dim=TEXT_WIDTH,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(partial(t5, UMT5EncoderModel, UMT5Config)),
        "tokenizer": t5_tokenizer("T5TokenizerFast", 512, fast=True),
        "transformer": weights.build(transformer),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            # For 480p; Wan's own advice is 5.0 for 720p.
            flow_shift=5.0 if from_image else 3.0,
        ),
    }
    settings: dict[str, Any] = {}
    if from_image:
        components["transformer_2"] = None
        settings = {"boundary_ratio": None, "expand_timesteps": True}
    write_pipeline(folder, "WanPipeline", components, **settings)


def _write_ltx(folder: Path) -> None:
    weights = ModuleWeights(9)
    channels = 16
    make_vae = partial(
        AutoencoderKLLTXVideo,
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    vae = weights.build_vae(make_vae, gain=0.8)
    # A buffer, which the real checkpoint fills too.
    vae.latents_mean.copy_(torch.from_numpy(weights.normal(channels, std=0.1)))
    transformer = partial(
        LTXVideoTransformer3DModel,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=TEXT_WIDTH,
        caption_channels=TEXT_WIDTH,
    )
    components = {
        "vae": vae,
        "text_encoder": weights.build(t5),
        "tokenizer": t5_tokenizer("T5Tokenizer", 128),
        "transformer": weights.build(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            base_shift=0.95,
            max_shift=2.05,
            shift_terminal=0.1,
            use_dynamic_shifting=True,
        ),
    }
    write_pipeline(folder, "LTXPipeline", components)


def _write_cogvideox(folder: Path) -> None:
    weights = ModuleWeights(2)
    channels = 16
    vae = partial(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.15258426,
    )
    transformer = partial(
        CogVideoXTransformer3DModel,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        time_embed_dim=32,
        text_embed_dim=TEXT_WIDTH,
        # The default size and length: 256 by 256 pixels, 17 frames.
        sample_width=32,
        sample_height=32,
        sample_frames=17,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.5),
        "text_encoder": weights.build(t5),
        "tokenizer": t5_tokenizer("T5Tokenizer", 226),
        "transformer": weights.build(transformer),
        "scheduler": CogVideoXDDIMScheduler(
            **SD_BETAS,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    }
    write_pipeline(folder, "CogVideoXPipeline", components)


def _write_hunyuanvideo(folder: Path) -> None:
    weights = ModuleWeights(13)
    vae = partial(
        AutoencoderKLHunyuanVideo,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = partial(
        HunyuanVideoTransformer3DModel,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(llama),
        "text_encoder_2": weights.build(clip_text),
        "tokenizer": Files("PreTrainedTokenizerFast", write_llama_tokenizer),
        "tokenizer_2": clip_tokenizer(),
        "transformer": weights.build(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    write_pipeline(folder, "HunyuanVideoPipeline", components)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "tiny-svd": _write_svd,
        "tiny-animatediff": _write_animatediff,
        "tiny-animatediff-sdxl": _write_animatediff_sdxl,
        "tiny-wan": partial(_write_wan, seed=21, from_image=False),
        "tiny-wan-ti2v": partial(_write_wan, seed=22, from_image=True),
        "tiny-ltx": _write_ltx,
        "tiny-cogvideox": _write_cogvideox,
        "tiny-hunyuanvideo": _write_hunyuanvideo,
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
