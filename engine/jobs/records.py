"""The records of all jobs, open while the jobs are served, and the one thread that writes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import Overloaded
from engine.jobs.store import JobStore

log = logging.getLogger(__name__)

T = TypeVar("T")


class JobRecords:
    """A `JobStore` for an event loop: writes go to one thread, in the order of the calls."""

    def __init__(self) -> None:
        """Closed, and touches no disk."""
        self._store: JobStore | None = None
        self._writer: ThreadPoolExecutor | None = None

    async def open(self, folder: Path) -> None:
        """Open or create the store in `folder`. On an error, call `close`.

        Raises:
            ConfigError: the records cannot be used; they are left as they are.

        """
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._store = await self.write(JobStore, folder)

    async def close(self) -> None:
        """Finish what is being written, and close the file."""
        writer, store = self._writer, self._store
        self._writer = self._store = None  # from here on `expire` does nothing
        if writer is not None:
            await asyncio.to_thread(writer.shutdown)
        if store is not None:
            store.close()

    @property
    def opened(self) -> bool:
        """Whether the records can be read and written."""
        return self._store is not None

    @property
    def store(self) -> JobStore:
        """The open store. Call its writing methods by `write` only.

        Raises:
            Overloaded: the records are not open.

        """
        if self._store is None:
            raise _not_served()
        return self._store

    async def write(self, function: Callable[..., T], *args: Any) -> T:
        """Call a writing method of the store on the writing thread.

        Raises:
            Overloaded: the records are not open.

        """
        if self._writer is None:
            raise _not_served()
        return await asyncio.get_running_loop().run_in_executor(self._writer, function, *args)

    def expire(self, job_ids: frozenset[str], now: int) -> None:
        """Note soon that the files of these jobs are gone; `now` in Unix seconds.

        From any thread. Not awaited: a caller that prunes files has no use for the outcome.
        """
        store, writer = self._store, self._writer
        if store is None or writer is None:
            return
        with suppress(RuntimeError):  # it is being closed; the missing file says the same
            writer.submit(partial(store.expire, job_ids, now)).add_done_callback(_log_failure)


def _not_served() -> Overloaded:
    return Overloaded("Jobs are not served at this moment.", retry_after_s=5.0)


def _log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("cannot note that outputs expired", exc_info=error)
