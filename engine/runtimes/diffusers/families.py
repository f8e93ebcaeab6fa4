"""What the code of a family of pipelines demands of sizes and frame counts."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of a family of pipelines demands. diffusers checks some of it, and late."""

    size_multiple: int = 8
    """Width and height must be multiples of this many pixels."""
    frame_step: int = 1
    """A pipeline makes 1, 1 + step, 1 + 2 · step, … frames. Other numbers are cut from more."""
    frames_at_once: int | None = None
    """Frames that the VAE decodes at once; None: all."""
    decoder_scale: int = 1
    """How much smaller than the image, on each side, the widest block of the VAE's decoder is."""
    many_images: bool = False
    """Whether an edit may start from several images."""


FAMILIES = {
    "AnimateDiff": Family(),
    "CogVideoX": Family(size_multiple=16, frame_step=4, frames_at_once=8),
    "Flux2": Family(size_multiple=16, many_images=True),
    "Flux": Family(size_multiple=16),
    "HunyuanVideo": Family(size_multiple=16, frame_step=4, frames_at_once=16),
    "LTX": Family(size_multiple=32, frame_step=8, decoder_scale=4),
    "QwenImageEditPlus": Family(size_multiple=16, many_images=True),
    "StableVideoDiffusion": Family(size_multiple=64),
    "Wan": Family(size_multiple=16, frame_step=4, frames_at_once=4),
}
"""By the beginning of the pipeline's class name.

Sizes are VAE scale × patch. For Stable Video Diffusion the UNet's own scale comes on top, as it
cannot have odd sizes inside. Frames come from the VAE's compression in time and from how its code
batches them. LTX's decoder leaves a patch of 4 × 4 to its last layer."""


def family_of(pipeline_class: str) -> Family:
    """What a pipeline class demands."""
    for beginning, family in FAMILIES.items():
        if pipeline_class.startswith(beginning):
            return family
    return Family()


def check_size(size: tuple[int, int], family: Family) -> None:
    """Refuse a size that the family cannot do.

    Raises:
        InvalidRequest: naming `size`.

    """
    multiple = family.size_multiple
    if any(side < multiple or side % multiple for side in size):
        raise InvalidRequest(
            f"Width and height must be multiples of {multiple} pixels for this model,"
            f" not {size_text(size)}.",
            param="size",
        )


def size_text(size: tuple[int, int]) -> str:
    """Width and height as in `1024x768`."""
    return f"{size[0]}x{size[1]}"
