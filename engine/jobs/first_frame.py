"""The image that an image-to-video model starts from, where another model makes it first."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ModelConfig
from engine.requests import ImageOperation, ImageRequest, VideoRequest

FIRST_FRAME_SHARE = 0.2
"""The share of a job's progress in which its first frame is made."""


def first_frame_request(model: ModelConfig, request: VideoRequest) -> ImageRequest | None:
    """The request for the first frame of a video; None if the model's options ask for none.

    `model` makes the video. A request that brings an image needs no first frame.
    """
    image_model = model.options.get("first_frame_model")
    if image_model is None or request.image is not None:
        return None
    return ImageRequest(
        model=image_model,
        operation=ImageOperation.GENERATION,
        request_id=request.request_id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        seed=request.seed,
        # These two options are about the model of the video, not about this one.
        scheduling=replace(request.scheduling, if_loaded_only=False, keep_alive_s=None),
    )
