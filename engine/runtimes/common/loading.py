"""A load on a runtime's own thread, which leaves nothing behind when it fails."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import Executor

from engine.config import ModelConfig
from engine.errors import EngineError, LoadFailed, reason
from engine.runtimes.base import LoadedModel


async def load_on_thread(
    thread: Executor,
    build: Callable[[ModelConfig], LoadedModel],
    model: ModelConfig,
    give_back: Callable[[], None],
) -> LoadedModel:
    """Call `build` on the thread. After an error, call `give_back` there too.

    Raises:
        EngineError: `build` raised it.
        LoadFailed: `build` raised another error.

    """
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(thread, build, model)
    except Exception as error:
        # The frames hold the parts built so far, as long as anything holds the error.
        traceback.clear_frames(error.__traceback__)
        await loop.run_in_executor(thread, give_back)
        if isinstance(error, EngineError):
            raise
        raise LoadFailed(reason(error)) from error
