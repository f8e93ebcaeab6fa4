"""One image or video request on one pipeline. It stops within a step.

Importing this module imports torch and diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.errors import InvalidRequest
from engine.events import Event, ImageResult, PartialImage, Progress, VideoResult
from engine.process.gate import GATE
from engine.requests import ImageRequest, VideoRequest
from engine.runtimes.common.torch_run import TorchRun
from engine.runtimes.diffusers.families import check_size, made_size
from engine.runtimes.diffusers.pipeline import Pipeline
from engine.runtimes.diffusers.pipeline_arguments import call_parameters, check_arguments
from engine.runtimes.diffusers.previews import decode_latents, preview_steps
from engine.runtimes.diffusers.prompts import in_chunks, takes_chunks, too_long


class Run(TorchRun):
    """One request on one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        request: Any,
        asked: Collection[str],
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        """`asked` are the fields that the client set, of those that not every pipeline has."""
        super().__init__(pipeline, shape, emit)
        self._asked = asked
        self._pipeline = pipeline
        self._request: ImageRequest | VideoRequest = request
        """Its size is that which the pipeline makes."""
        self._size = (request.width, request.height)
        width, height = made_size(self._size, pipeline.family)
        if (width, height) != self._size:
            self._request = replace(request, width=width, height=height)

    def _run(self) -> None:
        pipeline, request = self._pipeline, self._request
        assert request.width is not None and request.height is not None
        check_size(self._size, pipeline.family)
        pipeline.loras.set(request.loras)
        pipe = pipeline.variant(self._kind())
        check_arguments(self._asked, call_parameters(pipe))
        arguments = self._common(pipe)
        cuts = too_long(pipe, arguments, chat_prompt=pipeline.family.chat_prompt)
        chunked = bool(cuts) and takes_chunks(pipe)
        for cut in () if chunked else cuts:
            self._emit(cut)
        with GATE.step():
            self._emit(Progress(0.0))
            with self._measured():
                if chunked:
                    arguments = in_chunks(pipe, arguments, guided=self._is_guided(pipe))
                result = (
                    self._images(pipe, request, arguments)
                    if isinstance(request, ImageRequest)
                    else self._video(pipe, request, arguments)
                )
        self._emit(result)

    def _is_guided(self, pipe: Any) -> bool:
        """Whether each step computes the negative prompt too, by the rule of UNet pipelines."""
        assert self._request.guidance is not None
        return self._request.guidance > 1 and pipe.unet.config.time_cond_proj_dim is None

    def _kind(self) -> str:
        """The kind of pipeline that the request needs."""
        request = self._request
        if isinstance(request, VideoRequest):
            return "text" if request.image is None else "video-image"
        if request.mask is not None:
            return "inpaint"
        if request.images:
            return "image"
        return "text" if request.control_image is None else "control"

    def _images(self, pipe: Any, request: ImageRequest, arguments: dict[str, Any]) -> ImageResult:
        """Make one image after the other.

        Each equals the image that its seed gives alone, and memory does not grow with the count.
        """
        assert request.seed is not None
        arguments = arguments | self._conditions(pipe)
        images = []
        for index in range(request.n):
            # Partial images show the first image.
            previews = preview_steps(request, pipe) if index == 0 else {}
            callback = self._on_step(index, request.n, previews)
            images.append(
                pipe(
                    **arguments,
                    generator=torch.Generator("cpu").manual_seed(request.seed + index),
                    callback_on_step_end=callback,
                    output_type="pil",
                ).images[0]
            )
        images = [_middle(image, self._size) for image in images]
        return ImageResult(tuple(images), request.seed)

    def _conditions(self, pipe: Any) -> dict[str, Any]:
        request = self._request
        assert isinstance(request, ImageRequest)
        assert request.width is not None and request.height is not None
        size = (request.width, request.height)
        found: dict[str, Any] = {}
        if request.control_image is not None:
            found["image"] = _resized(request.control_image, size)
            found["controlnet_conditioning_scale"] = self._pipeline.options.control_scale
        elif request.images:
            images = [_resized(image, size) for image in request.images]
            found["image"] = images[0] if len(images) == 1 else images
            found["strength"] = request.strength
            if request.mask is not None:
                found["mask_image"] = _resized(request.mask, size)
        adapter = self._pipeline.options.ip_adapter
        if adapter is not None:
            # Its layers are part of the UNet and always run. At scale 0 they add nothing.
            reference = request.reference_image
            self._pipeline.base.set_ip_adapter_scale(adapter.scale if reference else 0.0)
            found["ip_adapter_image"] = reference or Image.new("RGB", (224, 224))
        accepted = call_parameters(pipe)
        return {name: value for name, value in found.items() if name in accepted}

    def _video(self, pipe: Any, request: VideoRequest, arguments: dict[str, Any]) -> VideoResult:
        assert request.seed is not None and request.num_frames is not None and request.fps
        accepted = call_parameters(pipe)
        if request.image is None and "image" in accepted:
            raise InvalidRequest("This model starts from an image.", param="input_reference")
        step = self._pipeline.family.frame_step
        # The model makes 1 + n × step frames. Those beyond the wanted number are cut off.
        arguments["num_frames"] = -(-(request.num_frames - 1) // step) * step + 1
        assert request.width is not None and request.height is not None
        extras: dict[str, Any] = {"fps": request.fps, "frame_rate": request.fps}
        if request.image is not None:
            extras["image"] = _resized(request.image, (request.width, request.height))
        if request.motion is not None:
            extras["motion_bucket_id"] = request.motion
        arguments |= {name: value for name, value in extras.items() if name in accepted}
        frames = pipe(
            **arguments,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=self._on_step(0, 1, {}),
            output_type="pil",
        ).frames[0]
        shown = (_middle(frame, self._size) for frame in frames[: request.num_frames])
        pixels = np.stack([np.asarray(frame) for frame in shown])
        return VideoResult(pixels, request.fps, request.seed)

    def _common(self, pipe: Any) -> dict[str, Any]:
        request, options = self._request, self._pipeline.options
        accepted = call_parameters(pipe)
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "max_guidance_scale": request.guidance,
            **options.call,
        }
        if request.negative_prompt:
            wanted["negative_prompt"] = request.negative_prompt
        return {name: value for name, value in wanted.items() if name in accepted}

    def _on_step(
        self, index: int, count: int, previews: Mapping[int, int]
    ) -> Callable[..., dict[str, Any]]:
        """The callback that the pipeline calls after every step.

        `previews` has the number of the partial image that is due after a step.
        """

        def on_step(
            pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            self.check()
            steps = max(1, getattr(pipe, "num_timesteps", 0) or self._request.steps or 1)
            self._emit(Progress((index + min(1.0, (step + 1) / steps)) / count))
            if step in previews:
                assert isinstance(self._request, ImageRequest)
                image = decode_latents(pipe, tensors["latents"], self._request)
                image = _middle(image, self._size)
                self._emit(PartialImage(previews[step], image))
            return {}

        return on_step


def _middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image that is a little larger."""
    if image.size == size:
        return image
    left, top = ((made - wanted) // 2 for made, wanted in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def _resized(image: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    assert image is not None
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
