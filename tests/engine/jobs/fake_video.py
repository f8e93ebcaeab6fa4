"""A video and an image model without a library, behind the real interface, and jobs on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.events import Event, Frames, ImageResult, Progress, VideoResult
from engine.jobs.queue import Jobs
from engine.media.outputs import Outputs
from engine.requests import ImageRequest, Request, VideoRequest
from engine.runtimes.base import Prepared
from engine.section import Section
from tests.server.fake import DEVICE_BYTES, FakeDevice, FakeOptions, FakeRuntime

NAME = "fake_video"
ADDRESS = "tests.engine.jobs.fake_video:FakeVideoRuntime"
"""What the registry of runtimes must hold under `NAME`."""


def frames_of(request: VideoRequest) -> Frames:
    """What a request gets: a grey that its seed gives and that fades, so that a mix-up shows."""
    count, height, width = request.num_frames or 0, request.height or 0, request.width or 0
    fade = np.linspace((request.seed or 0) % 128, 255, count).astype(np.uint8)
    return np.broadcast_to(fade[:, None, None, None], (count, height, width, 3)).copy()


async def make(request: Any) -> AsyncGenerator[Event, None]:
    """Two steps, then the result."""
    yield Progress(0.5)
    yield Progress(1.0)
    if isinstance(request, ImageRequest):
        image = Image.new("RGB", (request.width or 0, request.height or 0), "red")
        yield ImageResult((image,), request.seed or 0)
    else:
        yield VideoResult(frames_of(request), request.fps or 0, request.seed or 0)


class FakeVideoOptions(FakeOptions):
    first_frame_model: str | None = None


class FakeVideoRuntime(FakeRuntime):
    """Records the runs in `requests`; `answer` is what a run does."""

    name: ClassVar[str] = NAME
    Options: ClassVar[type[Section]] = FakeVideoOptions

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.answer = make

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if not isinstance(request, ImageRequest | VideoRequest):
            raise InvalidRequest("not text", param="model")
        if request.width == 13:
            raise InvalidRequest("width must be a multiple of 8", param="width")
        if isinstance(request, ImageRequest):
            return Prepared(request, None)
        fps = request.fps or 8
        asked = request.seconds and round(request.seconds * fps)
        filled = replace(
            request,
            width=request.width or 64,
            height=request.height or 48,
            fps=fps,
            num_frames=request.num_frames or asked or 6,
        )
        return Prepared(filled, None)


def video_engine(runtime: FakeVideoRuntime, folder: Path, **settings: object) -> Engine:
    """A real engine with three video models, one of them chained to an image model."""
    models: list[dict[str, object]] = [
        {"id": "film", "aliases": ["sora-2"], "task": "video"},
        {"id": "other", "task": "video"},
        {"id": "chained", "task": "video", "options": {"first_frame_model": "paint"}},
        {"id": "paint", "task": "image"},
    ]
    raw = {
        "memory": DEVICE_BYTES,
        "state_dir": folder / "state",
        "data_dir": folder / "data",
        "models": [{"runtime": NAME, "source": "none", **model} for model in models],
        **settings,
    }
    config = EngineConfig.model_validate(raw)
    return Engine(config, device=FakeDevice(), runtimes={NAME: lambda _: runtime})


@asynccontextmanager
async def serving(engine: Engine, **options: Any) -> AsyncIterator[Jobs]:
    """Jobs on a started engine; both are stopped at the end, the jobs first."""
    clock = {"clock": options["clock"]} if "clock" in options else {}
    jobs = Jobs(engine, options.pop("outputs", None) or Outputs(engine.config, **clock), **options)
    await engine.start()
    try:
        await jobs.start()
        try:
            yield jobs
        finally:
            await jobs.stop()
    finally:
        await engine.stop()
