"""Starter models that make images and videos: tiny diffusion pipelines, and what goes with them.

Each folder has the format of the hub repository it stands for: a `model_index.json`, a
folder per component, safetensors, tokenizer files. The components are instances of the
diffusers and transformers classes with small sizes; every parameter is then filled from a
seeded stream, so the same versions of those libraries always write the same bytes. The weights
are float32.

The schedulers are those of the real repositories; where a value is not plain, the line says
whose it is. Importing this module imports torch, transformers and diffusers (some 6 s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    PNDMScheduler,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers import __version__ as diffusers_version
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from engine.process.gate import GATE
from engine.starters.json_text import write_json
from engine.starters.prompt_tokenizers import (
    CLIP_EOS,
    T5_VOCABULARY,
    clip_vocabulary,
    llama_bpe,
    write_clip_tokenizer,
    write_llama_tokenizer,
    write_t5_tokenizer,
)

_TEXT_WIDTH = 32
"""Width of every text encoder but SDXL's second."""

_SDXL_TEXT_WIDTH_2 = 64
_TEMPORAL_WIDTH = 32
"""Stable Video Diffusion's modules normalise in 32 groups, so they cannot be narrower."""

_SD_BETAS: Mapping[str, Any] = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
)
"""The noise of everything that descends from Stable Diffusion."""

_Array = NDArray[np.float32]


def write_diffusion_starter(name: str, folder: Path) -> None:
    """Write the starter model `name`, one of `WRITERS`, into an empty folder.

    Modules are constructed one at a time behind the gate; torch's default dtype and random
    state are afterwards what they were. Takes less than half a second.

    Raises:
        KeyError: there is no diffusion starter of that name.
        OSError: the folder cannot be written.

    """
    WRITERS[name](folder)


class _Weights:
    """One seeded stream of normal numbers: the order of the calls decides the bytes."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def normal(self, *shape: int, std: float) -> _Array:
        """Independent numbers around zero."""
        return self._generator.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def linear(self, outputs: int, inputs: int) -> _Array:
        """A projection that keeps the scale of what it is given."""
        return self.normal(outputs, inputs, std=inputs**-0.5)

    def build(self, make: Callable[[], Any]) -> Any:
        """The module that `make` constructs, with every parameter from this stream.

        Projections and convolutions keep the scale of what they are given, biases are small,
        norms pass everything. Nothing is left at zero, as the outputs of adapters are before
        training: each part has an effect.
        """
        module = _construct(make)
        with torch.no_grad():
            for owner in module.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    parameter.copy_(torch.from_numpy(self._values(owner, name, parameter)))
        return module

    def build_vae(self, make: Callable[[], Any], gain: float) -> Any:
        """An autoencoder whose pictures have a middling contrast.

        `gain` scales the decoder's output, whose range is -1 to 1. The encoder's means are as
        large as the denoiser expects latents to be and its variances negligible (a standard
        deviation of 0.05): else an image given as input would drown in noise.
        """
        vae = self.build(make)
        decoder_out = _convolution(vae.decoder.conv_out)
        encoder_out = _convolution(getattr(vae, "quant_conv", None) or vae.encoder.conv_out)
        channels = vae.config.get("latent_channels") or vae.config.z_dim
        with torch.no_grad():
            decoder_out.weight.mul_(gain)
            encoder_out.weight[:channels].div_(vae.config.get("scaling_factor", 1.0))
            encoder_out.weight[channels:].zero_()
            encoder_out.bias[channels:].fill_(-6.0)
        return vae

    def _values(self, owner: nn.Module, name: str, parameter: nn.Parameter) -> _Array:
        shape = tuple(parameter.shape)
        if name == "bias":
            return self.normal(*shape, std=0.05)
        if isinstance(owner, nn.Embedding):
            return self.normal(*shape, std=1.0)
        if isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return self.normal(*shape, std=parameter[0].numel() ** -0.5)
        if name in {"weight", "gamma"}:  # of a norm
            return np.ones(shape, np.float32)
        return self.normal(*shape, std=shape[-1] ** -0.5)


def _construct(make: Callable[[], Any]) -> Any:
    """The module in float32 on the CPU, made behind the gate; torch's state is put back.

    Constructors draw their first weights from torch's global generator, and the gate only
    looks after that once an engine has registered it.
    """
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return make().eval()
        finally:
            torch.set_default_dtype(default_dtype)


def _save(component: Any, folder: Path) -> None:
    """Save what diffusers or transformers can save, without the progress bar of the latter."""
    settings: dict[str, Any] = {}
    if isinstance(component, CLIPTextModel):
        # transformers 5 takes the level `text_model` out of this class, and out of its
        # class with a projection not; the repositories have it in both.
        tensors = component.state_dict()
        settings["state_dict"] = {f"text_model.{key}": value for key, value in tensors.items()}
    with GATE.exclusive():
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            component.save_pretrained(folder, **settings)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()


def _convolution(module: Any) -> Any:
    """The convolution itself, which video models wrap to pad it in time."""
    return getattr(module, "conv", module)


@dataclass(frozen=True, slots=True)
class _Files:
    """A component that transformers loads from files which are written here.

    What `save_pretrained` writes for tokenizers and image processors depends on what else
    is installed, and is not what the real repositories hold.
    """

    class_name: str
    write: Callable[[Path], None]


def _write_pipeline(
    folder: Path, class_name: str, components: Mapping[str, Any], **settings: Any
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads; a component may be None."""
    index: dict[str, Any] = {
        "_class_name": class_name,
        "_diffusers_version": diffusers_version,
        **settings,
    }
    for name, component in components.items():
        if component is None:
            index[name] = [None, None]
        elif isinstance(component, _Files):
            (folder / name).mkdir()
            component.write(folder / name)
            index[name] = ["transformers", component.class_name]
        else:
            _save(component, folder / name)
            index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
    write_json(folder / "model_index.json", index)


# Stable Diffusion 1.5 and SDXL


def _sd15_parts(weights: _Weights) -> dict[str, Any]:
    """What AnimateDiff shares with Stable Diffusion 1.5."""
    return {
        "vae": weights.build_vae(_sd_vae, gain=0.8),
        "text_encoder": weights.build(_clip_text),
        "tokenizer": _clip_tokenizer(),
        "unet": weights.build(_sd15_unet),
    }


def _write_sd15(folder: Path) -> None:
    scheduler = PNDMScheduler(
        **_SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    components = {
        **_sd15_parts(_Weights(15)),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    _write_pipeline(folder, "StableDiffusionPipeline", components, requires_safety_checker=False)


def _sdxl_parts(weights: _Weights) -> dict[str, Any]:
    """What AnimateDiff shares with SDXL."""
    return {
        "vae": weights.build_vae(
            partial(_sd_vae, scaling_factor=0.13025, force_upcast=True), gain=0.8
        ),
        "text_encoder": weights.build(_clip_text),
        "text_encoder_2": weights.build(
            partial(
                _clip_text,
                CLIPTextModelWithProjection,
                hidden_size=_SDXL_TEXT_WIDTH_2,
                projection_dim=_TEXT_WIDTH,
                hidden_act="gelu",
            )
        ),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer(pad="!"),
        "unet": weights.build(_sdxl_unet),
    }


def _write_sdxl(folder: Path, *, seed: int, scheduler: Callable[..., Any], spacing: str) -> None:
    components = {
        **_sdxl_parts(_Weights(seed)),
        "scheduler": scheduler(**_SD_BETAS, steps_offset=1, timestep_spacing=spacing),
        "feature_extractor": None,
        "image_encoder": None,
    }
    _write_pipeline(
        folder, "StableDiffusionXLPipeline", components, force_zeros_for_empty_prompt=True
    )


def _sd_vae(**settings: Any) -> Any:
    """Four blocks, as every real one has: a pixel of the latents is eight of the image."""
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


def _sd15_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=8,
    )


def _sdxl_unet() -> Any:
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
        cross_attention_dim=_TEXT_WIDTH + _SDXL_TEXT_WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=time_ids * time_width + _TEXT_WIDTH,
        norm_num_groups=8,
    )


# FLUX


def _write_flux(folder: Path, *, seed: int, distilled: bool) -> None:
    """FLUX.1: schnell where it is distilled to few steps, else dev."""
    weights = _Weights(seed)
    vae = partial(
        _sd_vae,
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
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=not distilled,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(_clip_text),
        "text_encoder_2": weights.build(_t5),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _t5_tokenizer("T5TokenizerFast", 512, fast=True),
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
    _write_pipeline(folder, "FluxPipeline", components)


# Video


def _write_svd(folder: Path) -> None:
    weights = _Weights(25)
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
        cross_attention_dim=_TEXT_WIDTH,
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=3 * time_width,  # fps, motion bucket, noise
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "image_encoder": weights.build(_clip_vision),
        "unet": weights.build(unet),
        "feature_extractor": _Files("CLIPImageProcessor", _write_image_processor),
        "scheduler": EulerDiscreteScheduler(
            **_SD_BETAS,
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
    _write_pipeline(folder, "StableVideoDiffusionPipeline", components)


def _motion_adapter(**settings: Any) -> Any:
    return MotionAdapter(
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=32,
        **settings,
    )


def _animatediff_scheduler() -> Any:
    """What diffusers' AnimateDiff page recommends."""
    return DDIMScheduler(
        **{**_SD_BETAS, "beta_schedule": "linear"},
        clip_sample=False,
        timestep_spacing="linspace",
        steps_offset=1,
    )


def _write_animatediff(folder: Path) -> None:
    weights = _Weights(16)
    components = {
        **_sd15_parts(weights),
        "motion_adapter": weights.build(
            partial(_motion_adapter, block_out_channels=(16, 16, 32, 32))
        ),
        "scheduler": _animatediff_scheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }
    _write_pipeline(folder, "AnimateDiffPipeline", components)


def _write_animatediff_sdxl(folder: Path) -> None:
    weights = _Weights(17)
    adapter = partial(_motion_adapter, block_out_channels=(16, 32, 32), use_motion_mid_block=False)
    components = {
        **_sdxl_parts(weights),
        "motion_adapter": weights.build(adapter),
        "scheduler": _animatediff_scheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }
    _write_pipeline(
        folder, "AnimateDiffSDXLPipeline", components, force_zeros_for_empty_prompt=True
    )


def _write_wan(folder: Path) -> None:
    weights = _Weights(21)
    vae = partial(
        AutoencoderKLWan,
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
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
        text_dim=_TEXT_WIDTH,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(partial(_t5, UMT5EncoderModel, UMT5Config)),
        "tokenizer": _t5_tokenizer("T5TokenizerFast", 512, fast=True),
        "transformer": weights.build(transformer),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=3.0,  # for 480p; Wan's own advice is 5.0 for 720p
        ),
    }
    _write_pipeline(folder, "WanPipeline", components)


def _write_ltx(folder: Path) -> None:
    weights = _Weights(9)
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
    # Buffers, which the real checkpoint fills as well.
    vae.latents_mean.copy_(torch.from_numpy(weights.normal(channels, std=0.1)))
    transformer = partial(
        LTXVideoTransformer3DModel,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=_TEXT_WIDTH,
        caption_channels=_TEXT_WIDTH,
    )
    components = {
        "vae": vae,
        "text_encoder": weights.build(_t5),
        "tokenizer": _t5_tokenizer("T5Tokenizer", 128),
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
    _write_pipeline(folder, "LTXPipeline", components)


def _write_cogvideox(folder: Path) -> None:
    weights = _Weights(2)
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
        text_embed_dim=_TEXT_WIDTH,
        # The default size and length: 256 by 256 pixels, 17 frames.
        sample_width=32,
        sample_height=32,
        sample_frames=17,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.5),
        "text_encoder": weights.build(_t5),
        "tokenizer": _t5_tokenizer("T5Tokenizer", 226),
        "transformer": weights.build(transformer),
        "scheduler": CogVideoXDDIMScheduler(
            **_SD_BETAS,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    }
    _write_pipeline(folder, "CogVideoXPipeline", components)


def _write_hunyuanvideo(folder: Path) -> None:
    weights = _Weights(13)
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
        text_embed_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
    )
    components = {
        "vae": weights.build_vae(vae, gain=0.8),
        "text_encoder": weights.build(_llama),
        "text_encoder_2": weights.build(_clip_text),
        "tokenizer": _Files("PreTrainedTokenizerFast", write_llama_tokenizer),
        "tokenizer_2": _clip_tokenizer(),
        "transformer": weights.build(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    _write_pipeline(folder, "HunyuanVideoPipeline", components)


# What is added to a pipeline


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

    Real ones change each projection a little; this one by as much as the projection is itself.
    """
    weights = _Weights(seed)
    tensors: dict[str, _Array] = {}
    for part, make in parts.items():
        for name, layer in _construct(make).named_modules():
            if name.endswith(_LORA_TARGETS[part]):
                down = weights.linear(_LORA_RANK, layer.in_features)
                up = weights.linear(layer.out_features, _LORA_RANK)
                tensors[_LORA_KEYS[part].format(name, "down")] = down
                tensors[_LORA_KEYS[part].format(name, "up")] = up
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def _write_controlnet(folder: Path, unet: Callable[[], Any], *, seed: int) -> None:
    def make() -> Any:
        return ControlNetModel.from_unet(
            unet(),
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            load_weights_from_unet=False,
        )

    controlnet = _Weights(seed).build(make)
    with torch.no_grad():
        # Eight convolutions with no norm: each activation halves what it is given, so
        # without this nothing of the control image would arrive.
        for each in controlnet.controlnet_cond_embedding.modules():
            if isinstance(each, nn.Conv2d):
                each.weight.mul_(2.0)
    _save(controlnet, folder)


def _write_ip_adapter(folder: Path) -> None:
    """The layout of the repository h94/IP-Adapter."""
    weights = _Weights(4)
    models = folder / "models"
    _save(weights.build(_clip_vision), models / "image_encoder")
    image_tokens = 4
    tensors = {
        "image_proj.proj.weight": weights.linear(image_tokens * _TEXT_WIDTH, _TEXT_WIDTH),
        "image_proj.proj.bias": weights.normal(image_tokens * _TEXT_WIDTH, std=0.05),
        "image_proj.norm.weight": np.ones(_TEXT_WIDTH, np.float32),
        "image_proj.norm.bias": weights.normal(_TEXT_WIDTH, std=0.05),
    }
    unet = _construct(_sd15_unet)
    # All attention is counted, self-attention (`attn1`) too, which has no weights here.
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for projection in ("to_k", "to_v"):
                layer = attention.get_submodule(projection)
                tensors[f"ip_adapter.{index}.{projection}_ip.weight"] = weights.linear(
                    layer.out_features, layer.in_features
                )
    save_file(tensors, models / "ip-adapter_sd15.safetensors", metadata={"format": "pt"})


# Encoders of texts and images


def _clip_text(kind: Callable[..., Any] = CLIPTextModel, **settings: Any) -> Any:
    vocabulary = len(clip_vocabulary().ids)
    return kind(
        CLIPTextConfig(
            **{
                "vocab_size": vocabulary,
                "bos_token_id": vocabulary - 2,
                "eos_token_id": vocabulary - 1,
                "pad_token_id": vocabulary - 1,
                "hidden_size": _TEXT_WIDTH,
                "intermediate_size": 2 * _TEXT_WIDTH,
                "projection_dim": _TEXT_WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_act": "quick_gelu",
                **settings,
            }
        )
    )


def _clip_vision() -> Any:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,
            patch_size=32,
        )
    )


def _t5(kind: Callable[..., Any] = T5EncoderModel, config: Callable[..., Any] = T5Config) -> Any:
    return kind(
        config(
            vocab_size=T5_VOCABULARY,
            d_model=_TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def _llama() -> Any:
    """Four layers: the pipeline takes the states before the last two."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=llama_bpe().get_vocab_size(),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def _write_image_processor(folder: Path) -> None:
    """CLIP's; the numbers are the means and deviations of its training images."""
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


# Tokenizers


def _clip_tokenizer(pad: str = CLIP_EOS) -> _Files:
    return _Files("CLIPTokenizer", partial(write_clip_tokenizer, pad=pad))


def _t5_tokenizer(class_name: str, max_length: int, *, fast: bool = False) -> _Files:
    return _Files(class_name, partial(write_t5_tokenizer, max_length=max_length, fast=fast))


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
        "tiny-svd": _write_svd,
        "tiny-animatediff": _write_animatediff,
        "tiny-animatediff-sdxl": _write_animatediff_sdxl,
        "tiny-wan": _write_wan,
        "tiny-ltx": _write_ltx,
        "tiny-cogvideox": _write_cogvideox,
        "tiny-hunyuanvideo": _write_hunyuanvideo,
        "tiny-lora-sd15": partial(_write_lora, parts={"unet": _sd15_unet}, seed=5),
        "tiny-lora-sd15-b": partial(
            _write_lora, parts={"unet": _sd15_unet, "text_encoder": _clip_text}, seed=6
        ),
        "tiny-lora-sdxl": partial(_write_lora, parts={"unet": _sdxl_unet}, seed=7),
        "tiny-controlnet-sd15": partial(_write_controlnet, unet=_sd15_unet, seed=8),
        "tiny-controlnet-sdxl": partial(_write_controlnet, unet=_sdxl_unet, seed=11),
        "tiny-ip-adapter-sd15": _write_ip_adapter,
    }
)
"""What writes each model, by the names of `starter.DIFFUSION_STARTERS`."""
