"""The store of responses for an event loop: one thread writes, one reads."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from engine.errors import EngineError, NoSpaceLeft, Overloaded
from server.responses.store import FILE_NAME, ResponseStore

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RETRY_S = 5.0


class Keeper:
    """Opens the store with the server. A store that cannot be opened stops no model."""

    def __init__(self, folder: Path, max_bytes: int, max_age_s: float) -> None:
        """Touches no disk."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._store: ResponseStore | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="responses-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="responses-read")

    @property
    def opened(self) -> bool:
        """Whether responses are kept at this moment."""
        return self._store is not None

    async def start(self) -> None:
        """Open the file, and make it if it is not there."""
        try:
            self._store = await asyncio.get_running_loop().run_in_executor(
                self._writer, ResponseStore, self._folder, self._max_bytes, self._max_age_s
            )
        except (EngineError, sqlite3.Error, OSError) as error:
            log.error(
                "%s cannot be used, so no responses are kept: %s", self._folder / FILE_NAME, error
            )

    async def close(self) -> None:
        """Finish what is being written, and close the file."""
        store, self._store = self._store, None
        for executor in (self._writer, self._reader):
            await asyncio.to_thread(executor.shutdown)
        if store is not None:
            store.close()

    async def read(
        self,
        method: Callable[Concatenate[ResponseStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a reading method of the store.

        Raises:
            Overloaded: no responses are kept at this moment.
            EngineError: what the method raises.

        """
        return await self._call(self._reader, method, *args, **kwargs)

    async def write(
        self,
        method: Callable[Concatenate[ResponseStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a writing method of the store. It is done also where the caller is cancelled.

        Raises:
            NoSpaceLeft: the disk is full.
            Overloaded: no responses are kept at this moment.
            EngineError: what the method raises.

        """
        return await self._call(self._writer, method, *args, **kwargs)

    def write_soon(
        self,
        method: Callable[Concatenate[ResponseStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Call a writing method without waiting for it. What goes wrong is logged."""
        if self._store is not None:
            done = self._writer.submit(method, self._store, *args, **kwargs)
            done.add_done_callback(_log_failure)

    async def _call(
        self,
        executor: ThreadPoolExecutor,
        method: Callable[Concatenate[ResponseStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        if self._store is None:
            raise Overloaded("Responses are not kept at this moment.", retry_after_s=RETRY_S)
        done = executor.submit(method, self._store, *args, **kwargs)
        try:
            # Shielded: a future that is cancelled before its turn would never be run.
            return await asyncio.shield(asyncio.wrap_future(done))
        except sqlite3.Error as error:
            full = NoSpaceLeft.of(error, "the response")
            if full is not None:
                raise full from error
            log.error("%s: %s", self._folder / FILE_NAME, error)
            raise Overloaded(
                "The store of responses cannot be used at this moment.", retry_after_s=RETRY_S
            ) from error


def _log_failure(done: Future[T]) -> None:
    error = done.exception()
    if error is not None:
        log.error("a response could not be kept: %s", error)
