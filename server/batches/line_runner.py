"""Runs one line: its request, and whether the answer is its result or it is tried again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from engine.errors import EngineError, LoadFailed
from server.batches.body import encode_body
from server.batches.input import read_line
from server.batches.line_call import LineAnswer, LineCalls
from server.batches.live import LiveBatch
from server.batches.record import Line, Outcome
from server.batches.result import error_of, outcome_of, request_id_of, unanswered
from server.batches.store import BatchStore
from server.errors import Failure
from server.keys.access import Access
from server.stored_files.record import Viewer
from server.stored_files.store import FileStore

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Of a line: runs that the process did not survive, or that failed in a way that may pass."""
BACKOFF_S = 1.0
"""The wait before the second attempt; each later wait is four times as long."""
MAX_RETRY_S = 60.0
"""The longest wait for what the server or a provider asked to wait for."""

_BUSY = (429, 503)


class LineRunner:
    """Runs lines, and knows which of them wait for another attempt."""

    def __init__(
        self,
        files: FileStore,
        calls: LineCalls,
        access_of: Callable[[str], Access | None],
    ) -> None:
        self._files = files
        self._calls = calls
        self._access_of = access_of
        self._later: dict[tuple[int, int], float] = {}
        """When lines are tried again, by batch and number, on the clock of the loop."""
        self._tries: dict[tuple[int, int], int] = {}

    def is_ready(self, line: Line) -> bool:
        """Whether the line need not wait for its next attempt."""
        at = self._later.get((line.batch, line.number))
        return at is None or at <= asyncio.get_running_loop().time()

    def next_s(self) -> float | None:
        """Seconds until the next attempt of a line; None if none waits for one."""
        if not self._later:
            return None
        return max(0.01, min(self._later.values()) - asyncio.get_running_loop().time())

    def forget(self, batch: int) -> None:
        """Forget the lines of a batch that has ended."""
        for each in (self._later, self._tries):
            for key in [key for key in each if key[0] == batch]:
                del each[key]

    async def run(self, live: LiveBatch, line: Line, store: BatchStore) -> None:
        """Run the line. Its result is on disk when this returns, unless it is tried again.

        Raises:
            EngineError: the disk is full.

        """
        key = (line.batch, line.number)
        self._later.pop(key, None)
        outcome: Outcome | None = None
        try:
            outcome = await self._outcome(live, line)
            if outcome is not None:
                live.take(await asyncio.to_thread(store.finish, line, outcome))
                self._tries.pop(key, None)
        except BaseException:
            outcome = None
            raise
        finally:
            if outcome is None:
                await asyncio.to_thread(store.put_back, [line])

    async def _outcome(self, live: LiveBatch, line: Line) -> Outcome | None:
        """How the line ended; None: it is tried again."""
        batch = live.batch
        if line.attempts >= MAX_ATTEMPTS:
            message = f"The process ended {line.attempts} times while this request ran."
            return unanswered(batch, line, "runtime_failed", message)
        answer = live.broken.get(line.group)
        if answer is None:
            answer = await self._answer(live, line)
            wait_s = self._wait_s(live, line, answer)
            if wait_s is not None:
                log.info(
                    "line %d of %s is tried again in %.0f s: status %d",
                    line.number,
                    batch.id,
                    wait_s,
                    answer.status,
                )
                loop = asyncio.get_running_loop()
                self._later[line.batch, line.number] = loop.time() + wait_s
                return None
        return outcome_of(batch, line, answer)

    async def _answer(self, live: LiveBatch, line: Line) -> LineAnswer:
        batch = live.batch
        access = self._access_of(batch.owner)
        viewer = Viewer(batch.owner, sees_all=access is not None and access.admin)
        request_id = request_id_of(batch, line)

        def read_file(file_id: str) -> bytes:
            _, stream = self._files.open_file(viewer, file_id)
            with stream:
                return stream.read()

        def read() -> tuple[bytes, str]:
            if live.input is None:
                # Held by the batch, so it is there, whoever may see it now.
                owner = Viewer(batch.owner, sees_all=True)
                _, live.input = self._files.open_file(owner, batch.input_file_id)
            return encode_body(batch.endpoint, read_line(live.input, line), read_file)

        try:
            body, content_type = await asyncio.to_thread(read)
        except EngineError as error:
            response = Failure.of(error).response(batch.endpoint, request_id)
            return LineAnswer(response.status_code, response.headers, bytes(response.body))
        return await self._calls.post(batch.owner, batch.endpoint, body, content_type, request_id)

    def _wait_s(self, live: LiveBatch, line: Line, answer: LineAnswer) -> float | None:
        """Seconds until the line is tried again; None: the answer is its result."""
        if answer.ok:
            live.failed_loads.pop(line.group, None)
            return None
        may_pass = answer.headers.get("x-should-retry") != "false"
        if answer.status in _BUSY and may_pass:
            # Not counted: no attempt began. It ends with the completion window.
            asked = answer.headers.get("retry-after", "1")
            return min(MAX_RETRY_S, max(1.0, float(asked) if asked.isdecimal() else 1.0))
        if error_of(answer).get("code") == LoadFailed.code:
            # Of a thousand lines for a model that is broken not each one tries to load it.
            count = live.failed_loads[line.group] = live.failed_loads.get(line.group, 0) + 1
            if count >= MAX_ATTEMPTS:
                live.broken[line.group] = answer
                return None
            return float(BACKOFF_S * 4 ** (count - 1))
        if answer.status >= 500 and may_pass:
            key = (line.batch, line.number)
            tries = self._tries[key] = self._tries.get(key, 0) + 1
            return float(BACKOFF_S * 4 ** (tries - 1)) if tries < MAX_ATTEMPTS else None
        return None
