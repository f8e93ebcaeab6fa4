"""Partial images of a run: the steps after which they are due, and how latents become pixels.

Importing this module imports torch and diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from engine.requests import ImageRequest
from engine.runtimes.diffusers.pipeline_arguments import call_parameters


def preview_steps(request: ImageRequest, pipe: Any) -> dict[int, int]:
    """Step → number of the partial image due after it. Evenly spread; none at the last step."""
    steps = request.steps or 1
    if request.images and request.strength is not None and "strength" in call_parameters(pipe):
        steps = max(1, min(int(steps * request.strength), steps))
    count = min(request.partial_images, steps - 1)
    return {(number + 1) * steps // (count + 1) - 1: number for number in range(count)}


def decode_latents(pipe: Any, latents: Any, request: ImageRequest) -> Image.Image:
    """The image in the latents, decoded as the pipeline itself decodes them at the end."""
    vae = pipe.vae
    config = vae.config
    if hasattr(vae, "bn"):
        return _decode_normalised(pipe, latents, request)
    if hasattr(pipe, "_unpack_latents"):  # FLUX keeps them as a sequence of patches
        latents = pipe._unpack_latents(
            latents, request.height, request.width, pipe.vae_scale_factor
        )
    upcast = vae.dtype == torch.float16 and getattr(config, "force_upcast", False)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        scale = torch.tensor(std).view(shape).to(latents) / config.scaling_factor
        latents = latents * scale + torch.tensor(mean).view(shape).to(latents)
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    if upcast:
        vae.to(torch.float32)
    try:
        pixels = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def _decode_normalised(pipe: Any, latents: Any, request: ImageRequest) -> Image.Image:
    """FLUX.2's latents are a sequence of patches, with the means that a layer of its VAE keeps."""
    vae = pipe.vae
    assert request.width is not None and request.height is not None
    patch = 2 * pipe.vae_scale_factor
    rows, columns = request.height // patch, request.width // patch
    latents = latents.unflatten(1, (rows, columns)).movedim(-1, 1)
    shape = (1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(shape)
    latents = latents * deviation.to(latents) + vae.bn.running_mean.view(shape).to(latents)
    latents = pipe._unpatchify_latents(latents).to(vae.device, vae.dtype)
    pixels = vae.decode(latents, return_dict=False)[0]
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image
