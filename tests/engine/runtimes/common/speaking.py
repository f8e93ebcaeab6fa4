"""What the tests of speech runtimes share: a model loaded by its runtime, and what it says."""

from __future__ import annotations

import asyncio
import threading
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.events import Speech
from engine.requests import SpeechRequest
from engine.runtimes.base import LoadedModel, Runtime
from engine.runtimes.common.speech import SpeechModel

SEED = 11
TEXT = "Hello world, how are you? This is the second sentence. And a third!"


def speech_model(runtime: str, name: str, **options: Any) -> ModelConfig:
    return ModelConfig(
        id=name, runtime=runtime, task="speech", source=f"starter:{name}", options=options
    )


def speech_request(text: str = TEXT, **fields: Any) -> SpeechRequest:
    return SpeechRequest(
        **{"model": "m", "request_id": "test", "seed": SEED, "text": text, **fields}
    )


def write_recording(path: Path) -> None:
    """Four seconds of something like a voice: mono, 24 kHz, 16 bit."""
    times = np.arange(4 * 24_000) / 24_000
    voice = sum(np.sin(2 * np.pi * 140 * k * times) / k for k in range(1, 12))
    voice = voice * (0.3 + 0.2 * np.sin(2 * np.pi * 3 * times)) * 0.5
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes((np.asarray(voice) * 32767).astype("<i2").tobytes())


@asynccontextmanager
async def loaded(runtime: Runtime, model: ModelConfig) -> AsyncIterator[SpeechModel]:
    made = await runtime.load(model, pytest.fail)
    assert isinstance(made, SpeechModel)
    try:
        yield made
    finally:
        await runtime.unload(made)


async def spoken(
    runtime: Runtime, model: ModelConfig, on: LoadedModel, text: str = TEXT, **fields: Any
) -> list[NDArray[np.float32]]:
    """The pieces of audio."""
    events = on.run(runtime.prepare(model, speech_request(text, **fields)))
    return [event.samples async for event in events if isinstance(event, Speech)]


class Stop:
    """Holds a module of a model until it is released, and tells whether a later one has run."""

    def __init__(self, held: torch.nn.Module, later: torch.nn.Module) -> None:
        self.reached = threading.Event()
        self.later = False
        self._released = threading.Event()
        self._hooks = [
            held.register_forward_hook(self._hold),
            later.register_forward_hook(self._note),
        ]

    def _hold(self, *_: Any) -> None:
        self.reached.set()
        assert self._released.wait(20)

    def _note(self, *_: Any) -> None:
        self.later = True

    def release(self) -> None:
        self._released.set()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


async def cancel_within(
    runtime: Runtime, model: ModelConfig, on: SpeechModel, stop: Callable[[Any], Stop]
) -> Stop:
    """Close a run while it is held in the middle of its first sentence."""
    assert on.model is not None
    held = stop(on.model.module)
    events = on.run(runtime.prepare(model, speech_request()))
    first = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(held.reached.wait, 20)
    first.cancel()
    await asyncio.sleep(0)  # lets the cancellation arrive, which tells the run to stop
    held.release()
    await asyncio.gather(first, return_exceptions=True)
    await events.aclose()
    held.remove()
    return held
