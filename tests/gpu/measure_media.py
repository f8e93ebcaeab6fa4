"""Measure images, clips and speech of our engine against the library alone, on one device.

Both are in one process, each with its own copy of the weights, and are called in turn.

Usage: python -m tests.gpu.measure_media CONFIG.yaml (--small | --real)
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.engine import Engine
from engine.runtimes.diffusers.options import DiffusersOptions
from tests.gpu.arguments import arguments, read
from tests.gpu.device import DEVICE, free_bytes, synchronize
from tests.gpu.libraries import library
from tests.gpu.record import Figure, tell
from tests.gpu.requests import made, request_for

MOST = 1.05
"""Of the time of the library alone."""

AIMS_MS = {"sdxl-turbo": 84.0, "sdxl": 2500.0}
"""Published for an H100: SDXL Turbo at 512x512 in four steps with TensorRT, SDXL in 30 without."""

SECOND_COPY = 1.5
"""How much room the library's copy needs, in the bytes of ours: its weights and its run."""


async def measure(engine: Engine, model: ModelConfig, pairs: int) -> None:
    """Tell the figures of one model."""
    began = time.perf_counter()
    await made(engine, model)
    first_s = time.perf_counter() - began
    size = engine.model_status(model.id).device_bytes
    tell(Figure(f"{model.id}: first answer, from its files", first_s, "s", note=_bytes(size)))
    ours: list[float] = []
    bare: list[float] = []
    call = None
    if free_bytes() > SECOND_COPY * size:
        call = await asyncio.to_thread(library, model, engine.config.cache_dir, DEVICE)
        await asyncio.to_thread(call)
    for number in range(pairs):
        turns = ("ours", "bare") if number % 2 else ("bare", "ours")
        for turn in turns:
            if turn == "bare" and call is None:
                continue
            synchronize()
            began = time.perf_counter()
            if turn == "ours":
                answer = await made(engine, model)
            else:
                assert call is not None
                await asyncio.to_thread(call)
            synchronize()
            (ours if turn == "ours" else bare).append(time.perf_counter() - began)
    seconds = statistics.median(ours)
    tell(Figure(f"{model.id}: {_what(model)}", 1e3 * seconds, "ms", note=_spread(ours)))
    if model.id in AIMS_MS:
        aim = AIMS_MS[model.id]
        tell(Figure(f"{model.id}: time / {aim:g} ms published", 1e3 * seconds / aim))
    if bare:
        ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
        note = f"alone {_spread(bare)}"
        tell(Figure(f"{model.id}: ours / library alone", ratio, at_most=MOST, note=note))
    else:
        tell(Figure(f"{model.id}: no room for a second copy", 0.0, note="library not measured"))
    if model.task == "speech":
        rate = 24_000
        tell(Figure(f"{model.id}: real-time factor", seconds / (answer.size / rate)))
        seconds = await first_audio(engine, model)
        tell(Figure(f"{model.id}: first audio", 1e3 * seconds, "ms"))
    await engine.unload(model.id)


async def first_audio(engine: Engine, model: ModelConfig) -> float:
    """Seconds from the request for three sentences to the first samples."""
    text = " ".join(f"The locomotive number {n} waits." for n in range(3))
    began = time.perf_counter()
    session = await engine.open(request_for(model, text=text))
    async with aclosing(session.events()) as events:
        await anext(events)
        return time.perf_counter() - began


def _what(model: ModelConfig) -> str:
    if model.task == "speech":
        return "one sentence"
    options: Any = model.options_as(DiffusersOptions)
    frames = f", {options.num_frames} frames" if model.task == "video" else ""
    return f"{options.width}x{options.height}, {options.default.steps} steps{frames}"


def _bytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _spread(seconds: list[float]) -> str:
    return f"{1e3 * min(seconds):.0f}–{1e3 * max(seconds):.0f} ms of {len(seconds)}"


async def main(path: Path, *, small: bool) -> None:
    """Measure every model of the configuration."""
    engine = Engine(read(path))
    await engine.start()
    try:
        for model in engine.config.models:
            await measure(engine, model, 1 if small else 5 if model.task != "video" else 2)
    finally:
        await engine.stop()


if __name__ == "__main__":
    given = arguments(__doc__)
    asyncio.run(main(given.config, small=given.small))
