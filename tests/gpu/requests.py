"""The requests of the checks, and their answers as plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.engine import Engine
from engine.events import ImageResult, Speech, VideoResult
from engine.requests import (
    ImageOperation,
    ImageRequest,
    Request,
    SpeechRequest,
    TextOperation,
    TextRequest,
    VideoRequest,
)
from engine.runtimes.diffusers.options import DiffusersOptions
from tests.gpu.libraries import PROMPT, SEED, SENTENCE, scene


def request_for(model: ModelConfig, **fields: Any) -> Request:
    """What `tests.gpu.libraries` asks of the library, asked of the engine."""
    common = {"model": model.id, "request_id": "check", "seed": SEED}
    if model.task == "speech":
        voice = "af_heart" if model.runtime == "kokoro" else "Claribel Dervla"
        return SpeechRequest(**{**common, "text": SENTENCE, "voice": voice, **fields})
    if model.task == "image":
        operation = ImageOperation.GENERATION
        return ImageRequest(**{**common, "operation": operation, "prompt": PROMPT, **fields})
    if model.task == "video":
        options = model.options_as(DiffusersOptions)
        if "svd" in model.id:
            fields = {"image": scene(options.width, options.height), "motion": 60, **fields}
        return VideoRequest(**{**common, "prompt": PROMPT, **fields})
    return text_request(model.id, **fields)


def text_request(model_id: str, *, prompt: str = "hello", **fields: Any) -> TextRequest:
    """A greedy, streamed completion of one token, an event for each token."""
    body = {
        "model": model_id,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_interval": 1,
        **fields,
    }
    return TextRequest(model_id, TextOperation.COMPLETION, body, request_id="check")


async def made(engine: Engine, model: ModelConfig, **fields: Any) -> NDArray[Any]:
    """The pixels (frames, height, width, 3) or the samples of one request."""
    session = await engine.open(request_for(model, **fields))
    pieces: list[NDArray[Any]] = []
    async for event in session.events():
        if isinstance(event, ImageResult):
            pieces += [np.asarray(image)[None] for image in event.images]
        elif isinstance(event, VideoResult):
            pieces.append(event.frames)
        elif isinstance(event, Speech):
            pieces.append(event.samples)
    return np.concatenate(pieces)
