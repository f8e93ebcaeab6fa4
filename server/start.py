"""Starting the engine behind a server that already answers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.engine import Engine

logger = logging.getLogger(__name__)


class Start:
    """The engine's start as a task of its own: importing a runtime takes many seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        """Why the engine could not start, or None."""
        self.failed = asyncio.Event()

    def begin(self) -> None:
        """Start the engine in the background."""
        self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """Give up a start under way and stop the engine."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._engine.stop()

    async def _run(self) -> None:
        try:
            await self._engine.start()
        except Exception as error:
            logger.critical("the engine could not start: %s", error)
            self.error = error
            self.failed.set()
