"""The start of the engine and its jobs, behind a server that already answers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.jobs.queue import Jobs

logger = logging.getLogger(__name__)


class Part(Protocol):
    """What begins after the engine and its jobs, and stops before them."""

    async def start(self) -> None:
        """Begin."""

    async def stop(self) -> None:
        """Stop. A second call does nothing."""


class Start:
    """The engine's start as a task of its own, as the import of a runtime takes many seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: Jobs | None = None
        self._batches: Part | None = None
        self._task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        """Why the engine could not start, or None."""
        self.cut_short = False
        """Whether it was cancelled. A thread of it may go on for long: an import cannot stop."""
        self.failed = asyncio.Event()
        self.done = asyncio.Event()
        """Set once the engine and its jobs have started."""

    def begin(self, jobs: Jobs, batches: Part) -> None:
        """Start the engine, then its jobs and the batches, in the background."""
        self._jobs, self._batches = jobs, batches
        self._task = asyncio.create_task(self._run(jobs, batches))

    def fail(self, error: Exception) -> None:
        """Report that what must come before the start has failed."""
        logger.critical("the server could not start: %s", error)
        self.error = error
        self.failed.set()

    async def drain(self, limit_s: float) -> None:
        """Keep the jobs for the next start, and let requests finish for at most `limit_s`."""
        async with asyncio.TaskGroup() as group:
            if self._jobs is not None:
                # First, as the engine would wait for jobs. They can continue after the next start.
                group.create_task(self._jobs.stop())
            if self._batches is not None:
                group.create_task(self._batches.stop())
            group.create_task(self._engine.drain(limit_s))

    async def end(self) -> None:
        """Cancel a start under way, and stop the jobs and the engine."""
        if self._task is not None:
            self.cut_short = self._task.cancel()
            await asyncio.wait((self._task,))
        try:
            if self._batches is not None:
                await self._batches.stop()
            if self._jobs is not None:
                await self._jobs.stop()
        finally:
            await self._engine.stop()

    async def _run(self, jobs: Jobs, batches: Part) -> None:
        try:
            await self._engine.start()
            await jobs.start()
            await batches.start()
            self.done.set()
        except Exception as error:
            logger.critical("the engine could not start: %s", error)
            self.error = error
            self.failed.set()
