"""Batches: files of requests that may wait, which run while nobody else needs the device.

A kill at any moment loses no line, and none is in the results twice: a result is recorded before
the next line of its slot begins, and the lines that ran at that moment run again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.caller import Caller
from engine.errors import (
    Conflict,
    InvalidRequest,
    NoSpaceLeft,
    NotFound,
    QueueFull,
    ShuttingDown,
)
from server.batches.input import ENDPOINTS, Checks, read_input
from server.batches.lanes import Lanes
from server.batches.line_call import LineCalls
from server.batches.line_runner import LineRunner
from server.batches.live import LiveBatch
from server.batches.metrics import BatchCounts, BatchMetrics
from server.batches.record import Batch, BatchState, Line, LineError
from server.batches.result import unanswered
from server.batches.store import BatchStore
from server.keys.access import Access
from server.stored_files.record import Purpose, Viewer
from server.stored_files.store import FileStore, id_of

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.settings import ServerSettings

log = logging.getLogger(__name__)

MAX_UNFINISHED = 100
"""Batches of one key."""

LOOK_EVERY_S = 1.0
"""The interval between looks for batches that have expired."""
PRUNE_EVERY_S = 300.0
"""The interval between deletions of files and records that have expired."""
RETRY_S = 30.0
"""The wait after the disk could not be written."""

_HOLDER = "batch_"


class Batches:
    """All batches of the server. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        files: FileStore,
        calls: LineCalls,
        settings: ServerSettings,
        access_of: Callable[[str], Access | None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no disk. `access_of` says what the key of that name may do now."""
        self._engine = engine
        self._files = files
        self._settings = settings
        self._access_of = access_of
        self._clock = clock
        self._runner = LineRunner(files, calls, access_of)
        self._live: dict[int, LiveBatch] = {}
        """By sequence, the oldest first."""
        self._store: BatchStore | None = None
        self._lanes: Lanes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.metrics = BatchMetrics(self._counts)

    async def start(self) -> None:
        """Open the records and go on with what is unfinished. The engine has started.

        Raises:
            ConfigError: the records cannot be used; they are left as they are.

        """
        store = self._store = await asyncio.to_thread(BatchStore, self._engine.config.data_dir)
        self._lanes = Lanes(
            self._engine,
            store,
            self._runner,
            self._settings,
            self._live,
            self._settle,
            self._clock,
        )
        unfinished = await asyncio.to_thread(store.unfinished)
        for holder in await asyncio.to_thread(self._files.holders):
            if holder.startswith(_HOLDER) and holder not in {batch.id for batch in unfinished}:
                await asyncio.to_thread(self._files.release, holder)
        for batch in unfinished:
            self._take(batch)
        if unfinished:
            log.info("%d unfinished batches go on", len(unfinished))
        self._spawn(self._keep_looking())
        self._lanes.wake()

    async def stop(self) -> None:
        """Interrupt the lines that run, which lose no attempt. The next start goes on."""
        lanes, self._lanes = self._lanes, None
        if lanes is None:
            return
        await lanes.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for live in self._live.values():
            if live.input is not None:
                live.input.close()
        self._live.clear()
        store, self._store = self._store, None
        if store is not None:
            await asyncio.to_thread(store.close)

    async def create(
        self,
        viewer: Viewer,
        access: Access,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: float,
        metadata: Mapping[str, str] | None = None,
        output_expires_s: int | None = None,
    ) -> Batch:
        """Take a batch. It is on disk when this returns, and is validated then.

        Raises:
            InvalidRequest: naming the field at fault.
            NotFound: there is no such input file.
            QueueFull: the key has too many unfinished batches.
            ShuttingDown: batches are not served at this moment.

        """
        store = self._opened
        if endpoint not in ENDPOINTS:
            message = f"endpoint: it is one of {', '.join(ENDPOINTS)}."
            raise InvalidRequest(message, param="endpoint")
        if not access.may_call(endpoint):
            message = f"This API key may not use {endpoint}."
            raise InvalidRequest(message, param="endpoint", status=403)
        file = await asyncio.to_thread(
            self._files.get, viewer, input_file_id, param="input_file_id"
        )
        if file.purpose is not Purpose.BATCH:
            message = f"The file has the purpose {file.purpose.value!r} instead of 'batch'."
            raise InvalidRequest(message, param="input_file_id")
        own = [live for live in self._live.values() if live.batch.owner == viewer.name]
        if len(own) >= MAX_UNFINISHED:
            message = f"{len(own)} of your batches are unfinished, the bound."
            raise QueueFull(message, retry_after_s=60.0)
        now = int(self._clock())
        batch = Batch(
            id=f"{_HOLDER}{secrets.token_hex(16)}",
            owner=viewer.name,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            metadata=metadata,
            state=BatchState.VALIDATING,
            created_at=now,
            expires_at=now + int(window_s),
            output_expires_s=output_expires_s,
        )

        def insert() -> Batch:
            self._files.hold(input_file_id, batch.id)
            return store.insert(batch)

        batch = await asyncio.to_thread(insert)
        self._take(batch)
        return batch

    async def get(self, viewer: Viewer, batch_id: str) -> Batch:
        """One batch.

        Raises:
            NotFound: there is none that the viewer sees.

        """
        return await asyncio.to_thread(self._opened.get, viewer, batch_id)

    async def list(
        self, viewer: Viewer, *, limit: int, after: str | None
    ) -> tuple[list[Batch], bool]:
        """Up to `limit` batches, the newest first, and whether there are more.

        Raises:
            NotFound: the viewer sees no batch `after`.

        """
        return await asyncio.to_thread(self._opened.list, viewer, limit=limit, after=after)

    async def cancel(self, viewer: Viewer, batch_id: str) -> Batch:
        """Begin no further line. The lines that run end, and the results so far are kept.

        Raises:
            NotFound: there is none that the viewer sees.
            Conflict: it has ended.

        """
        batch = await self.get(viewer, batch_id)
        batch = await asyncio.to_thread(
            self._opened.move,
            batch,
            BatchState.CANCELLING,
            int(self._clock()),
            only_from=(BatchState.VALIDATING, BatchState.IN_PROGRESS),
        )
        if batch.state not in (BatchState.CANCELLING, BatchState.CANCELLED):
            raise Conflict(f"The batch is {batch.state.value}.")
        live = self._live.get(batch.sequence)
        if live is not None:
            live.take(batch)
            live.ends_as = BatchState.CANCELLED
            self._settle(live)
        return batch

    @property
    def _opened(self) -> BatchStore:
        if self._store is None or self._lanes is None:
            raise ShuttingDown("Batches are not served at this moment.", retry_after_s=5.0)
        return self._store

    def _take(self, batch: Batch) -> None:
        """Go on with a batch."""
        live = self._live[batch.sequence] = LiveBatch(batch)
        if batch.state is BatchState.CANCELLING:
            live.ends_as = BatchState.CANCELLED
        if batch.state is BatchState.VALIDATING:
            self._spawn(self._validate(live))
        else:
            self._settle(live)

    async def _validate(self, live: LiveBatch) -> None:
        """Check every line. The first one may run once all are good."""
        store, batch = self._opened, live.batch
        # A key that is gone may use nothing.
        gone = Access(Caller(batch.owner), admin=False, models=frozenset())
        access = self._access_of(batch.owner) or gone
        viewer = Viewer(batch.owner, sees_all=access.admin)
        checks = Checks(
            self._engine,
            access,
            batch.endpoint,
            self._settings.max_body_bytes,
            partial(self._files.get, viewer),
        )

        def check() -> Batch:
            now = int(self._clock())
            try:
                # Held by the batch, so it is there unless somebody deleted it on the disk.
                _, stream = self._files.open_file(Viewer("", sees_all=True), batch.input_file_id)
            except NotFound as error:
                return store.refuse(batch, [LineError(error.code, error.message)], now)
            with stream:
                lines, errors = read_input(stream, batch.sequence, checks)
            if errors:
                return store.refuse(batch, errors, now)
            return store.begin_lines(batch, lines, now)

        validated = await self._until_there_is_room(batch, check)
        if live.closing:  # it was cancelled meanwhile
            return
        live.batch = validated
        if live.batch.state is BatchState.FAILED:
            await self._forget(live)
            return
        self._settle(live)
        if self._lanes is not None:
            self._lanes.wake()

    def _settle(self, live: LiveBatch) -> None:
        """End the batch if nothing of it is left to run."""
        batch = live.batch
        done = batch.completed + batch.failed
        validated = batch.state is not BatchState.VALIDATING
        over = live.ends_as is not None or (validated and done >= batch.total)
        if over and not live.running and not live.closing and self._lanes is not None:
            live.closing = True
            self._spawn(self._close(live))

    async def _close(self, live: LiveBatch) -> None:
        """Write the files of the results, and end the batch. A restart does it again, once."""
        write = partial(self._write_results, live)
        live.batch = await self._until_there_is_room(live.batch, write)
        await self._forget(live)

    @staticmethod
    async def _until_there_is_room(batch: Batch, write: Callable[[], Batch]) -> Batch:
        """What `write` returns, on a thread. It is called again while the disk is full."""
        while True:
            try:
                return await asyncio.to_thread(write)
            except (OSError, NoSpaceLeft) as error:
                log.error("%s waits, as the disk cannot be written: %s", batch.id, error)
                await asyncio.sleep(RETRY_S)

    def _write_results(self, live: LiveBatch) -> Batch:
        store, batch, state = self._opened, live.batch, live.ends_as or BatchState.COMPLETED
        now = int(self._clock())
        if state is BatchState.EXPIRED:
            batch = store.finish_rest(batch, partial(_expired, batch))
        elif state is BatchState.COMPLETED:
            batch = store.move(
                batch, BatchState.FINALIZING, now, only_from=(BatchState.IN_PROGRESS,)
            )
        made: dict[bool, str | None] = {True: None, False: None}
        for ok, count, what in (
            (True, batch.completed, "output"),
            (False, batch.failed, "error"),
        ):
            if not count:
                continue
            file_id = made[ok] = id_of(batch.id, what)
            if not self._files.has(file_id):
                self._files.create(
                    batch.owner,
                    Purpose.BATCH_OUTPUT,
                    f"{batch.id}_{what}.jsonl",
                    store.results(batch, ok=ok),
                    expires_after_s=batch.output_expires_s,
                    file_id=file_id,
                    bounded=False,
                )
        return store.end(batch, state, int(self._clock()), made[True], made[False])

    async def _forget(self, live: LiveBatch) -> None:
        """Let go of a batch that has ended."""
        batch = live.batch
        self._live.pop(batch.sequence, None)
        self._runner.forget(batch.sequence)
        self.metrics.count(completed=batch.completed, failed=batch.failed)
        if live.input is not None:
            live.input.close()
        await asyncio.to_thread(self._files.release, batch.id)
        log.info(
            "%s is %s: %d completed, %d failed of %d",
            batch.id,
            batch.state.value,
            batch.completed,
            batch.failed,
            batch.total,
        )

    async def _keep_looking(self) -> None:
        """End batches whose time is over, and delete what has expired."""
        pruned_s = -PRUNE_EVERY_S
        loop = asyncio.get_running_loop()
        while True:
            now = self._clock()
            for live in list(self._live.values()):
                if live.batch.expires_at <= now and live.ends_as is None and not live.closing:
                    live.ends_as = BatchState.EXPIRED
                    self._settle(live)
            if loop.time() - pruned_s >= PRUNE_EVERY_S:
                pruned_s = loop.time()
                await asyncio.to_thread(self._prune, now)
            await asyncio.sleep(LOOK_EVERY_S)

    def _prune(self, now: float) -> None:
        self._files.prune()
        if self._settings.file_age != float("inf"):
            self._opened.prune(int(now - self._settings.file_age))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch could not go on", exc_info=error)

    def _counts(self) -> BatchCounts:
        live = [*self._live.values()]
        running = [each for each in live if each.running]
        lines = sum(each.running for each in running)
        left = sum(each.batch.total - each.batch.completed - each.batch.failed for each in live)
        return BatchCounts(len(live) - len(running), len(running), lines, max(0, left - lines))


def _expired(batch: Batch, line: Line) -> bytes:
    message = "This request could not be executed before the completion window expired."
    return unanswered(batch, line, "batch_expired", message).result
