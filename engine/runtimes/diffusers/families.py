"""What the code of a family of pipelines demands of sizes and frame counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.errors import InvalidRequest
from engine.runtimes.diffusers.description import PipelineDescription

CROPPED_MULTIPLE = 16
"""Sizes of this multiple are served by every family. One with a coarser grid makes a little more,
and the middle is cut out: OpenAI's 1280x720 of a model that needs multiples of 32."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of a family of pipelines demands. diffusers checks some of it, and late."""

    size_multiple: int = 8
    """Width and height that its code makes are multiples of this many pixels."""
    frame_step: int = 1
    """A pipeline makes 1, 1 + step, 1 + 2 · step, … frames. Other numbers are cut from more."""
    frames_at_once: int | None = None
    """Frames that the VAE decodes at once; None: all."""
    decoder_scale: int = 1
    """How much smaller than the image, on each side, the widest block of the VAE's decoder is."""
    many_images: bool = False
    """Whether an edit may start from several images."""
    has_strength: bool = True
    """Whether an edit starts from a noisy image. Otherwise it looks at the image as it is."""
    negative_prompt: Literal["guidance", "true_cfg_scale", "never", "maybe"] = "guidance"
    """Whose value makes a negative prompt act: the guidance above `guided_above`, or that
    argument's above 1."""
    guided_above: float = 1.0
    """The guidance above which each step also computes the negative prompt."""
    true_cfg_scale: float = 1.0
    """The pipeline's own value of that argument."""
    embeds_guidance: bool = False
    """Whether the guidance scale is an input of the denoiser, if its weights take one."""
    needs_no_guidance: bool = False
    """Whether its weights were distilled to need none, and its code takes none."""
    first_frame: Literal["never", "maybe", "always"] = "maybe"
    """Whether a video starts from an image."""
    chat_prompt: bool = False
    """Whether the prompt is a turn of a chat for its text encoder."""
    unused_parts: tuple[str, ...] = ()
    """Parts of the repositories of its models that its pipeline does not take."""


FAMILIES = {
    "AnimateDiff": Family(first_frame="never", unused_parts=("safety_checker",)),
    "CogVideoX": Family(size_multiple=16, frame_step=4, frames_at_once=8, first_frame="never"),
    "Flux2Klein": Family(
        size_multiple=16,
        many_images=True,
        has_strength=False,
        negative_prompt="never",
        chat_prompt=True,
    ),
    "Flux2": Family(
        size_multiple=16,
        many_images=True,
        has_strength=False,
        negative_prompt="never",
        embeds_guidance=True,
    ),
    "FluxKontext": Family(
        size_multiple=16,
        has_strength=False,
        negative_prompt="true_cfg_scale",
        embeds_guidance=True,
    ),
    "Flux": Family(size_multiple=16, negative_prompt="true_cfg_scale", embeds_guidance=True),
    "HunyuanVideo": Family(
        size_multiple=16,
        frame_step=4,
        frames_at_once=16,
        first_frame="never",
        negative_prompt="true_cfg_scale",
        embeds_guidance=True,
    ),
    "LatentConsistencyModel": Family(negative_prompt="never"),
    "LTX": Family(size_multiple=32, frame_step=8, decoder_scale=4),
    "QwenImageEditPlus": Family(
        size_multiple=16,
        many_images=True,
        has_strength=False,
        negative_prompt="true_cfg_scale",
        true_cfg_scale=4.0,
        embeds_guidance=True,
    ),
    "QwenImage": Family(
        size_multiple=16,
        negative_prompt="true_cfg_scale",
        true_cfg_scale=4.0,
        embeds_guidance=True,
    ),
    # Beside its own VAE, the repository of SDXL 1.0 has an older one.
    "StableDiffusionXL": Family(unused_parts=("vae_1_0",)),
    "StableVideoDiffusion": Family(size_multiple=64, negative_prompt="never", first_frame="always"),
    "Wan": Family(size_multiple=16, frame_step=4, frames_at_once=4),
    "ZImage": Family(size_multiple=16, guided_above=0.0, chat_prompt=True),
}
"""By the beginning of the pipeline's class name.

Sizes are VAE scale × patch. For Stable Video Diffusion the UNet's own scale comes on top, as it
cannot have odd sizes inside. Frames come from the VAE's compression in time and from how its code
batches them. LTX's decoder leaves a patch of 4 × 4 to its last layer."""


NOT_HERE = PipelineDescription()
"""Of a model whose files are not here yet."""

UNKNOWN = Family(negative_prompt="maybe")
"""Of a model whose files are not here yet: nothing is refused that it might do."""


def family_of(pipeline_class: str, described: PipelineDescription = NOT_HERE) -> Family:
    """What a pipeline class demands, and the model's own files; an empty name is not known yet."""
    if not pipeline_class:
        return UNKNOWN
    found = next(
        (family for key, family in FAMILIES.items() if pipeline_class.startswith(key)), Family()
    )
    if "ImageToVideo" in pipeline_class:
        found = replace(found, first_frame="always")
    return replace(
        found,
        size_multiple=described.size_multiple or found.size_multiple,
        needs_no_guidance=described.is_distilled,
    )


def check_guidance(
    family: Family,
    *,
    negative_prompt: str | None,
    asked: float | None,
    guidance: float,
    default: float,
    is_input: bool | None,
    call: Mapping[str, Any],
) -> None:
    """Refuse a negative prompt or a guidance that would have no effect.

    `asked` is the guidance in the request, `guidance` that of the run, `default` the model's.
    `is_input` is whether the denoiser takes it as an input; None: that is not known. `call` has
    further arguments of the pipeline.

    Raises:
        InvalidRequest: naming `negative_prompt` or `guidance`.

    """
    without = family.needs_no_guidance or (family.embeds_guidance and is_input is False)
    if without and asked not in (None, default):
        raise InvalidRequest(
            "This model was trained to need no guidance, and takes none.", param="guidance"
        )
    if not negative_prompt or family.negative_prompt == "maybe":
        return
    if family.negative_prompt == "true_cfg_scale":
        acts = float(call.get("true_cfg_scale", family.true_cfg_scale)) > 1
    elif family.negative_prompt == "guidance":
        acts = guidance > family.guided_above and not (is_input and not family.embeds_guidance)
    else:
        acts = False
    if acts:
        return
    hint = ""
    if family.negative_prompt == "guidance" and not is_input:
        least = f"{family.guided_above:g}"
        hint = f" It acts with a guidance above {least}, and this run has {guidance:g}."
    raise InvalidRequest(
        f"A negative prompt has no effect on this model.{hint}", param="negative_prompt"
    )


def check_size(size: tuple[int, int], family: Family) -> None:
    """Refuse a size that the family cannot do.

    Raises:
        InvalidRequest: naming `size`.

    """
    multiple = min(family.size_multiple, CROPPED_MULTIPLE)
    if any(side < family.size_multiple or side % multiple for side in size):
        least = ""
        if multiple < family.size_multiple:
            least = f", and at least {family.size_multiple}"
        raise InvalidRequest(
            f"Width and height must be multiples of {multiple} pixels for this model{least},"
            f" not {size_text(size)}.",
            param="size",
        )


def made_size(size: tuple[int, int], family: Family) -> tuple[int, int]:
    """The size that a pipeline makes, of which `size` is cut out."""
    width, height = (-(-side // family.size_multiple) * family.size_multiple for side in size)
    return width, height


def size_text(size: tuple[int, int]) -> str:
    """Width and height as in `1024x768`."""
    return f"{size[0]}x{size[1]}"
