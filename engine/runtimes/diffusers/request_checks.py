"""The checks of a request for images or a video, and the defaults that they fill in."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

from engine.errors import InvalidRequest
from engine.files.lora_folder import lora_files
from engine.files.safetensors_header import DTYPE_BYTES
from engine.requests import ImageOperation, ImageRequest, VideoRequest
from engine.runtimes.base import Prepared
from engine.runtimes.diffusers.families import (
    Family,
    check_guidance,
    check_size,
    made_size,
    size_text,
)
from engine.runtimes.diffusers.options import MAX_STEPS, TILE_SIDE, DiffusersOptions
from engine.runtimes.diffusers.pipeline_arguments import (
    OF_VARIANTS,
    asked_fields,
    check_arguments,
    class_arguments,
)
from engine.words import echoed

DECODER_COPIES = 3
"""Tensors of full size alive at once in a VAE decoder's last block: input, normalised, output."""

MAX_SEED = 2**32 - 1

PIECE_WIDTH = 2 * 77 * 2048
"""Numbers of one more chunk of two prompts, at the width of SDXL's two encoders."""

ImageOrVideo = TypeVar("ImageOrVideo", ImageRequest, VideoRequest)


@dataclass(frozen=True, slots=True)
class RequestChecks:
    """The facts about a model that its requests are checked against."""

    model_id: str
    options: DiffusersOptions
    family: Family
    decoder_channels: int
    """Of the VAE's decoder at full size."""
    guidance_is_input: bool | None = None
    """Whether the denoiser takes the guidance scale as an input; None: that is not known."""
    pipeline_class: str = ""
    """Empty while the model's files are not here, unless its options name it."""

    def image(self, request: ImageRequest) -> Prepared:
        """Check a request for images.

        Raises:
            InvalidRequest: naming the field at fault.

        """
        options = self.options
        family = self.family
        if not 1 <= request.n <= options.max_n:
            raise InvalidRequest(f"n must be from 1 to {options.max_n}.", param="n")
        if request.operation is not ImageOperation.GENERATION and not request.images:
            raise InvalidRequest("An image to start from is needed.", param="image")
        if len(request.images) > 1 and not family.many_images:
            raise InvalidRequest(
                f"The model {self.model_id!r} starts from one image, not {len(request.images)}.",
                param="image",
            )
        if request.mask is not None and not request.images:
            raise InvalidRequest("A mask needs an image.", param="mask")
        if request.mask is not None and request.mask.size != request.images[0].size:
            raise InvalidRequest(
                f"The mask is {size_text(request.mask.size)} pixels, the image"
                f" {size_text(request.images[0].size)}.",
                param="mask",
            )
        if request.control_image is not None and options.controlnet is None:
            raise InvalidRequest(
                f"The model {self.model_id!r} has no ControlNet.", param="control_image"
            )
        if request.control_image is not None and request.images:
            raise InvalidRequest("Give an image or a control image.", param="control_image")
        if request.reference_image is not None and options.ip_adapter is None:
            raise InvalidRequest(
                f"The model {self.model_id!r} has no IP-Adapter.", param="reference_image"
            )
        if request.strength is not None:
            self._check_strength(request)
        if request.images and request.width is None and request.height is None:
            width, height = _fit(request.images[0].size, family.size_multiple, options.max_pixels)
            request = replace(request, width=width, height=height)
        filled = self._fill(request)
        if filled.images:
            filled = self._fill_strength(request, filled)
        shape = f"{filled.operation}-{filled.width}x{filled.height}"
        parts = (("mask", filled.mask), ("partial", filled.partial_images),
                 ("control", filled.control_image), ("image", filled.images))  # fmt: skip
        shape += "".join(f"-{name}" for name, there in parts if there)
        return self._prepared(filled, shape, self._asked(request), frames=1)

    def _check_strength(self, request: ImageRequest) -> None:
        if not request.images:
            raise InvalidRequest(
                "strength is how far an edit leaves its image. This request has no image.",
                param="strength",
            )
        if not self.family.has_strength and request.mask is None:
            raise InvalidRequest(
                f"The model {self.model_id!r} edits without a strength.", param="strength"
            )

    def _fill_strength(self, asked: ImageRequest, filled: ImageRequest) -> ImageRequest:
        strength = self.options.strength if filled.strength is None else filled.strength
        if not 0 < strength <= 1:
            raise InvalidRequest("strength must be above 0, at most 1.", param="strength")
        # An image-to-image run takes steps × strength steps, and fails if that is none.
        least = ceil(1 / strength)
        assert filled.steps is not None
        if asked.steps is not None and asked.steps < least:
            raise InvalidRequest(
                f"With a strength of {strength} it takes at least {least} steps.", param="steps"
            )
        return replace(filled, strength=strength, steps=max(filled.steps, least))

    def video(self, request: VideoRequest) -> Prepared:
        """Check a request for a video.

        Raises:
            InvalidRequest: naming the field at fault.

        """
        options = self.options
        self._check_first_frame(request)
        fps = options.fps if request.fps is None else request.fps
        if not 1 <= fps <= 120:
            raise InvalidRequest("fps must be from 1 to 120.", param="fps")
        param, frames = "num_frames", request.num_frames
        if frames is None and request.seconds is not None:
            param, frames = "seconds", round(request.seconds * fps)
        if frames is None:
            frames = options.num_frames
        if not 1 <= frames <= options.max_frames:
            raise InvalidRequest(
                f"The model {self.model_id!r} makes 1 to {options.max_frames} frames"
                f" ({options.max_frames / fps:g} seconds at {fps} a second), not {frames}.",
                param=param,
            )
        if request.motion is not None and not 0 <= request.motion <= 255:
            raise InvalidRequest("motion must be from 0 to 255.", param="motion")
        filled = replace(self._fill(request), fps=fps, num_frames=frames, seconds=frames / fps)
        shape = f"video-{filled.width}x{filled.height}x{frames}"
        if filled.image is not None:
            shape += "-image"
        return self._prepared(filled, shape, self._asked(request), frames=frames)

    def _check_first_frame(self, request: VideoRequest) -> None:
        wanted, is_made = self.family.first_frame, self.options.first_frame_model is not None
        if request.image is not None and wanted == "never":
            raise InvalidRequest(
                f"The model {self.model_id!r} cannot start from an image.", param="input_reference"
            )
        if request.image is None and wanted == "always" and not is_made:
            raise InvalidRequest(
                f"The model {self.model_id!r} starts from an image.", param="input_reference"
            )

    def _fill(self, request: ImageOrVideo) -> ImageOrVideo:
        """Size, steps, guidance and seed, checked; and the adapters."""
        options = self.options
        width = options.width if request.width is None else request.width
        height = options.height if request.height is None else request.height
        check_size((width, height), self.family)
        if width * height > options.max_pixels:
            raise InvalidRequest(
                f"{size_text((width, height))} is more than the {options.max_pixels} pixels that"
                f" the model {self.model_id!r} may make.",
                param="size",
            )
        profile = options.profile(request.quality)
        steps = profile.steps if request.steps is None else request.steps
        if not 1 <= steps <= MAX_STEPS:
            raise InvalidRequest(f"steps must be from 1 to {MAX_STEPS}.", param="steps")
        guidance = profile.guidance if request.guidance is None else request.guidance
        if not 0 <= guidance <= 100:
            raise InvalidRequest("guidance must be from 0 to 100.", param="guidance")
        self._check_guidance(request, guidance, profile.guidance)
        seed = random.randrange(MAX_SEED) if request.seed is None else request.seed
        if not 0 <= seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be from 0 to {MAX_SEED}.", param="seed")
        self._check_loras(request)
        return replace(
            request, width=width, height=height, steps=steps, guidance=guidance, seed=seed
        )

    def _check_guidance(
        self, request: ImageRequest | VideoRequest, guidance: float, default: float
    ) -> None:
        negative_prompt = request.negative_prompt
        if self.options.first_frame_model is not None and self.family.negative_prompt == "never":
            negative_prompt = None  # it acts on the first frame
        check_guidance(
            self.family,
            negative_prompt=negative_prompt,
            asked=request.guidance,
            guidance=guidance,
            default=default,
            is_input=self.guidance_is_input,
            call=self.options.call,
        )

    def _asked(self, request: ImageRequest | VideoRequest) -> frozenset[str]:
        """The fields that the client set, of those that not every pipeline has."""
        asked = asked_fields(request)
        if self.options.first_frame_model is not None:
            asked -= {"negative_prompt"}  # it acts on the first frame
        own = asked - OF_VARIANTS
        accepted = class_arguments(self.pipeline_class) if own else None
        if accepted is not None:
            check_arguments(own, accepted)
        return asked

    def _check_loras(self, request: ImageRequest | VideoRequest) -> None:
        if not request.loras:
            return
        known = lora_files(self.options.loras).keys() | self.options.lora_sources.keys()
        for index, choice in enumerate(request.loras):
            if choice.name not in known:
                there = ", ".join(sorted(known)) or "none"
                raise InvalidRequest(
                    f"The model {self.model_id!r} has no LoRA {echoed(choice.name)};"
                    f" there is {there}.",
                    param=f"loras[{index}].name",
                )
            if not -10 <= choice.weight <= 10:
                raise InvalidRequest(
                    "The weight of a LoRA must be from -10 to 10.", param=f"loras[{index}].weight"
                )
        names = [choice.name for choice in request.loras]
        if len(set(names)) < len(names):
            raise InvalidRequest("A LoRA is named twice.", param="loras")

    def _prepared(
        self,
        request: ImageRequest | VideoRequest,
        shape: str,
        asked: frozenset[str],
        *,
        frames: int,
    ) -> Prepared:
        """The request with an estimate from the decoder, whose last block is the peak."""
        options = self.options
        assert request.width is not None and request.height is not None
        family = self.family
        at_once = int(options.call.get("decode_chunk_size", family.frames_at_once or frames))
        width, height = made_size((request.width, request.height), family)
        pixels = width * height
        decoded = min(pixels, TILE_SIDE**2) if options.vae_tiling else pixels
        item_bytes = DTYPE_BYTES[options.vae_dtype or options.dtype]
        widest = self.decoder_channels * item_bytes * DECODER_COPIES
        working = decoded * min(frames, at_once) * widest // family.decoder_scale**2
        working += pixels * frames * 3
        assert request.guidance is not None
        if request.guidance > family.guided_above:
            shape += "-guided"  # the denoiser then has twice the batch
        if request.loras:
            shape += "-" + "+".join(sorted(choice.name for choice in request.loras))
        if pieces := _text_pieces(request):
            shape += f"-text{pieces.bit_length()}"
            working += pieces * PIECE_WIDTH * item_bytes
        return Prepared(request, asked, working_bytes=working, shape=shape)


def _text_pieces(request: ImageRequest | VideoRequest) -> int:
    """About how many chunks of CLIP's a prompt has beyond the first, at four letters a token."""
    texts = (request.prompt, request.negative_prompt or "")
    return max(len(text.encode(errors="replace")) for text in texts) // (75 * 4)


def _fit(size: tuple[int, int], multiple: int, max_pixels: int) -> tuple[int, int]:
    """The largest size that the family can do, at most the image's and at most `max_pixels`."""
    width, height = size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    return (
        max(multiple, int(width * scale) // multiple * multiple),
        max(multiple, int(height * scale) // multiple * multiple),
    )
