"""The parts that several starters share: encoders, tokenizers, VAE and UNets of tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from engine.starters.diffusion.modules import ModuleWeights
from engine.starters.diffusion.pipeline_folder import Files
from engine.starters.diffusion.prompt_tokenizers import (
    CLIP_EOS,
    T5_VOCABULARY,
    chat_bpe,
    clip_vocabulary,
    llama_bpe,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from engine.starters.json_text import write_json

TEXT_WIDTH = 32
"""The width of every text encoder except the second of SDXL."""

SDXL_TEXT_WIDTH_2 = 64

SD_BETAS: Mapping[str, Any] = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
)
"""The noise of everything that descends from Stable Diffusion."""


def sd15_parts(weights: ModuleWeights) -> dict[str, Any]:
    """The components that Stable Diffusion 1.5 and AnimateDiff share."""
    return {
        "vae": weights.build_vae(sd_vae, gain=0.8),
        "text_encoder": weights.build(clip_text),
        "tokenizer": clip_tokenizer(),
        "unet": weights.build(sd15_unet),
    }


def sdxl_parts(weights: ModuleWeights) -> dict[str, Any]:
    """The components that SDXL and AnimateDiff on SDXL share."""
    return {
        "vae": weights.build_vae(
            partial(sd_vae, scaling_factor=0.13025, force_upcast=True), gain=0.8
        ),
        "text_encoder": weights.build(clip_text),
        "text_encoder_2": weights.build(
            partial(
                clip_text,
                CLIPTextModelWithProjection,
                hidden_size=SDXL_TEXT_WIDTH_2,
                projection_dim=TEXT_WIDTH,
                hidden_act="gelu",
            )
        ),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad="!"),
        "unet": weights.build(sdxl_unet),
    }


def sd_vae(**settings: Any) -> Any:
    """Four blocks, as in every real one: a pixel of the latents is eight of the image."""
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "sample_size": 512,
            "scaling_factor": 0.18215,
            **settings,
        }
    )


def sd15_unet() -> Any:
    """The denoiser of Stable Diffusion 1.5: four levels, the last without attention."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def sdxl_unet() -> Any:
    """The denoiser of SDXL, which also takes the size and crop of the image as an input."""
    time_ids, time_width = 6, 8
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=TEXT_WIDTH + SDXL_TEXT_WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=time_ids * time_width + TEXT_WIDTH,
        norm_num_groups=8,
    )


def clip_text(kind: Callable[..., Any] = CLIPTextModel, **settings: Any) -> Any:
    """CLIP's text encoder of the given class; `settings` replace those of its configuration."""
    vocabulary = len(clip_vocabulary().ids)
    return kind(
        CLIPTextConfig(
            **{
                "vocab_size": vocabulary,
                "bos_token_id": vocabulary - 2,
                "eos_token_id": vocabulary - 1,
                "pad_token_id": vocabulary - 1,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 2 * TEXT_WIDTH,
                "projection_dim": TEXT_WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_act": "quick_gelu",
                **settings,
            }
        )
    )


def clip_vision() -> Any:
    """CLIP's image encoder with its projection."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,
            patch_size=32,
        )
    )


def t5(kind: Callable[..., Any] = T5EncoderModel, config: Callable[..., Any] = T5Config) -> Any:
    """A T5 encoder of the given class."""
    return kind(
        config(
            vocab_size=T5_VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def llama() -> Any:
    """Four layers: the pipeline takes the states before the last two."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=llama_bpe().get_vocab_size(),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def qwen3(kind: Callable[..., Any], layers: int) -> Any:
    """Qwen 3 of the given class, whose output layer is its embedding, as in the real one of 4 B."""
    return kind(
        Qwen3Config(
            vocab_size=chat_bpe().get_vocab_size(),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def write_image_processor(folder: Path) -> None:
    """CLIP's image processor, with the means and deviations of its training images."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": 224},
        },
    )


def clip_tokenizer(pad: str = CLIP_EOS) -> Files:
    """CLIP's tokenizer, which pads with `pad`."""
    return Files("CLIPTokenizer", partial(write_clip_tokenizer, pad=pad))


def t5_tokenizer(class_name: str, max_length: int, *, fast: bool = False) -> Files:
    """A T5 tokenizer; `class_name` is the one that `model_index.json` names."""
    return Files(class_name, partial(write_t5_tokenizer, max_length=max_length, fast=fast))
