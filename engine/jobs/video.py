"""The video of a job: made by the engine, with its first frame if need be, and written to files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Cut, ImageResult, Progress, VideoResult
from engine.jobs.first_frame import FIRST_FRAME_SHARE, first_frame_request
from engine.media.mp4 import write_mp4, write_thumbnail
from engine.media.outputs import Outputs
from engine.requests import ImageRequest, VideoRequest

SUFFIXES = {"video": ".mp4", "thumbnail": ".webp"}

ResultT = TypeVar("ResultT", ImageResult, VideoResult)


class VideoMaker:
    """Makes one video. Asks the engine once or, with a first frame, twice."""

    def __init__(
        self,
        engine: Engine,
        on_progress: Callable[[float], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        """`on_progress` gets the progress of the whole, 0 to 1; `clock` gives seconds."""
        self.run_s = 0.0
        """Seconds of the runs so far, without waiting for a turn or for a model."""
        self.cuts: list[Cut] = []
        """Texts of the request that were too long for a model."""
        self._engine = engine
        self._on_progress = on_progress
        self._clock = clock

    async def make(self, request: VideoRequest) -> VideoResult:
        """Make the first frame, if the model is set up so, and then the video.

        Raises:
            EngineError: a run was refused or failed.

        """
        begin = 0.0
        first_frame = first_frame_request(self._engine.config.find(request.model), request)
        if first_frame is not None:
            begin = FIRST_FRAME_SHARE
            made = await self._collect(first_frame, ImageResult, 0.0, begin)
            request = replace(request, image=made.images[0])
        return await self._collect(request, VideoResult, begin, 1.0)

    async def _collect(
        self,
        request: ImageRequest | VideoRequest,
        kind: type[ResultT],
        begin: float,
        end: float,
    ) -> ResultT:
        """The result of a run of which the progress counts from `begin` to `end`."""
        session = await self._engine.open(request)
        opened_at = self._clock()
        result: ResultT | None = None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Progress):
                    await self._on_progress(begin + (end - begin) * event.done)
                elif isinstance(event, kind):
                    result = event
        if result is None:
            raise RuntimeFailed(f"{request.model!r} ended without a result.")
        self.cuts += session.notes.cuts
        self.run_s += session.timings.run_ms / 1e3 + max(0.0, self._clock() - opened_at)
        return result


def save_video(outputs: Outputs, job_id: str, result: VideoResult) -> None:
    """Write the files of a job, the video last: with it the job has all of them."""

    def thumbnail(path: Path) -> None:
        write_thumbnail(path, result.frames[0])

    def video(path: Path) -> None:
        write_mp4(path, result.frames, result.fps)

    outputs.add(job_id + SUFFIXES["thumbnail"], thumbnail)
    outputs.add(job_id + SUFFIXES["video"], video)
