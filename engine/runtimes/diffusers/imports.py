"""The imports of diffusers that would otherwise come with the first loads.

Importing this module imports torch and diffusers.
"""

from __future__ import annotations

import pkgutil
from contextlib import suppress
from importlib import import_module

import transformers

import diffusers
from diffusers import schedulers
from engine.runtimes.common.late_imports import late_module, sparing_transformers

LAZY_MODULES = (
    "diffusers.guiders",
    "diffusers.loaders.peft",
    "diffusers.pipelines.animatediff.pipeline_animatediff",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.flux2.pipeline_flux2_klein",
    "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.z_image.pipeline_z_image",
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.t5.modeling_t5",
)
"""Modules that diffusers imports only at the first load of a family.

They take seconds, which belong to the start.
"""


def import_everything() -> None:
    """Import what the first loads would import, and silence the libraries."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with sparing_transformers():
        _import_schedulers()
        for module in LAZY_MODULES:
            import_module(module)


def _import_schedulers() -> None:
    """Import all schedulers without SciPy (0.5 s and 490 modules).

    They need it only for beta sigmas and for linear multistep, and import it when they do.
    """
    with late_module("scipy.stats"), late_module("scipy.integrate"):
        for module in pkgutil.iter_modules(schedulers.__path__, f"{schedulers.__name__}."):
            with suppress(ImportError):  # a scheduler that needs what is not installed
                import_module(module.name)
