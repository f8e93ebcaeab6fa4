"""Jobs in a process of its own, which stops at a given point for its parent to kill it.

Usage: python -m tests.engine.jobs.run_jobs FOLDER POINT [PROMPT …]

Submits a job for each prompt, writes a line whenever one reaches the point, and without a point
waits until all jobs have ended and writes their records.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from PIL import Image

from engine.events import Event, Progress
from engine.media.outputs import Outputs
from engine.requests import VideoRequest
from engine.runtimes.registry import REGISTRY
from tests.engine.jobs.fake_video import (
    ADDRESS,
    NAME,
    FakeVideoRuntime,
    make,
    serving,
    video_engine,
)


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def endless(request: Any) -> AsyncGenerator[Event, None]:
    say(reached=request.prompt)  # before any progress, as a load that kills the process
    await asyncio.Event().wait()
    yield Progress(1.0)


class StoppingOutputs(Outputs):
    """Stops in the middle of the video's file, or when it is there and not yet recorded."""

    point = ""

    def add(self, name: str, write: Callable[[Path], None], *, sweep: bool = True) -> None:
        def half(path: Path) -> None:
            write(path)
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            self._stop()

        if not name.endswith(".mp4"):
            super().add(name, write, sweep=sweep)
        elif self.point == "half":
            super().add(name, half, sweep=sweep)
        else:
            super().add(name, write, sweep=sweep)
            self._stop()

    def _stop(self) -> None:
        say(reached=self.point)
        threading.Event().wait()


async def main(folder: Path, point: str, prompts: list[str]) -> None:
    runtime = FakeVideoRuntime()
    runtime.answer = endless if point == "run" else make
    engine = video_engine(runtime, folder)
    outputs = StoppingOutputs(engine.config) if point in ("half", "saved") else None
    if outputs is not None:
        outputs.point = point
    async with serving(engine, outputs=outputs) as jobs:
        for seed, prompt in enumerate(prompts):
            image = Image.new("RGB", (64, 48), (seed, 2, 3))
            # Two models, so that two jobs run at a time.
            model = ("film", "other")[seed % 2]
            request = VideoRequest(
                model=model, request_id="", prompt=prompt, image=image, seed=seed, num_frames=9
            )
            say(submitted=(await jobs.submit(request)).id)
        if point != "none":
            await asyncio.Event().wait()
        records, _ = jobs.list(limit=100, order="asc")
        for job in records:
            say(ended=dataclasses.asdict(await jobs.ended(job.id)))


if __name__ == "__main__":
    REGISTRY[NAME] = ADDRESS
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
