"""Which lines run when: group after group, in the gaps that other requests leave.

The device is one lane, and each remote model is one of its own. In a lane the lines of one model
run until none is left. So each model is brought in once, however its lines lie in the files.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from engine.costs.provider import LOCAL, provider_of
from engine.errors import EngineError, ModelNotFound
from engine.requests import Priority
from server.batches.line_runner import LineRunner
from server.batches.live import LiveBatch
from server.batches.record import Line
from server.batches.store import BatchStore

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.settings import ServerSettings

log = logging.getLogger(__name__)

DEVICE = ""
"""The lane of all that runs here, and of routes."""

PAUSE_S = 10.0
"""The wait after a failure of the server itself, such as a full disk."""
LATE_S = 3600.0
"""After such a wait a batch goes before others whose models are on the device."""
LOOK_S = 1.0
"""The interval between looks whether the models that must leave are in use."""


class Lanes:
    """Runs the lines of the batches in `live`."""

    def __init__(
        self,
        engine: Engine,
        store: BatchStore,
        runner: LineRunner,
        settings: ServerSettings,
        live: Mapping[int, LiveBatch],
        on_line_end: Callable[[LiveBatch], None],
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self.engine = engine
        self.store = store
        self.runner = runner
        self.settings = settings
        self.live = live
        self.on_line_end = on_line_end
        self._lanes: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        """Set and replaced when there may be more to run."""

    def wake(self) -> None:
        """Look for lines to run: there is another batch."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._begin(DEVICE)

    async def stop(self) -> None:
        """Interrupt all lines that run. They lose no attempt."""
        for task in self._lanes.values():
            task.cancel()
        if self._lanes:
            await asyncio.wait(self._lanes.values())
        self._lanes.clear()

    def open_batches(self) -> list[int]:
        """The batches of which lines may begin."""
        return [sequence for sequence, live in self.live.items() if live.begins_lines]

    def lane_of(self, group: str) -> str:
        """The lane in which the lines of a group run."""
        with suppress(ModelNotFound):
            if provider_of(self.engine.config.find(group)) != LOCAL:
                return group
        return DEVICE

    def _begin(self, lane: str) -> None:
        if lane not in self._lanes:
            self._lanes[lane] = asyncio.create_task(self._run(lane))

    async def _run(self, lane: str) -> None:
        while True:
            changed = self._changed
            try:
                group = await self._next_group(lane)
                if group is not None:
                    await _Turn(self, group, remote=lane != DEVICE).run()
                    continue
            except Exception as error:
                expected = isinstance(error, EngineError)
                log.error("the batches pause: %s", error, exc_info=not expected)
                await asyncio.sleep(PAUSE_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self.runner.next_s()):
                    await changed.wait()

    async def _next_group(self, lane: str) -> str | None:
        """The group to run next: one whose model is there, otherwise that of the oldest batch."""
        batches = self.open_batches()
        if not batches:
            return None
        late_at = self._clock() - LATE_S
        found: list[tuple[bool, bool, int, str]] = []
        for group, oldest in await asyncio.to_thread(self.store.groups, batches):
            own = self.lane_of(group)
            if own != lane:
                self._begin(own)
            elif await self.ready(group, batches):
                live = self.live.get(oldest)
                late = live is not None and live.batch.created_at <= late_at
                found.append((not late, not late and not self.is_there(group), oldest, group))
        return min(found)[3] if found else None

    async def ready(
        self, group: str, batches: Collection[int], running: Iterable[Line] = ()
    ) -> list[Line]:
        """The lines of a group and of these batches that may begin now."""
        begun = {(line.batch, line.number) for line in running}
        waiting = await asyncio.to_thread(self.store.waiting, group, batches)
        return [
            line
            for line in waiting
            if (line.batch, line.number) not in begun and self.runner.is_ready(line)
        ]

    def is_there(self, group: str) -> bool:
        """Whether the model of a group is on the device. Of a route nobody knows."""
        try:
            return self.engine.model_status(group).tier == "device"
        except ModelNotFound:
            return False


class _Turn:
    """The lines of one group, some of them at once, until none is left."""

    def __init__(self, lanes: Lanes, group: str, *, remote: bool) -> None:
        self._lanes = lanes
        self._group = group
        self._remote = remote
        self._batches = lanes.open_batches()
        """Others wait for the next turn, so that no group keeps the others waiting for ever."""
        self._running: dict[asyncio.Task[None], Line] = {}

    async def run(self) -> None:
        """Run them.

        Raises:
            Exception: of a line that could not be recorded. All others have ended then.

        """
        waiting: deque[Line] = deque()
        try:
            while True:
                if not self._places(waiting):
                    await self._one_ends()
                    continue
                if not waiting:
                    running = [*self._running.values()]
                    waiting.extend(await self._lanes.ready(self._group, self._batches, running))
                    if not waiting:
                        if not self._running:
                            return
                        await self._one_ends()
                        continue
                if not self._remote:
                    await self._gap()
                await self._begin(waiting)
        finally:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)

    def _places(self, waiting: deque[Line]) -> int:
        """How many further lines may begin. One that may have killed the process runs alone."""
        if any(line.attempts for line in self._running.values()):
            return 0
        if waiting and waiting[0].attempts:
            return 0 if self._running else 1
        return self._lanes.settings.batch_concurrency - len(self._running)

    async def _one_ends(self) -> None:
        await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in self._running if task.done()]:
            del self._running[task]
            task.result()

    async def _begin(self, waiting: deque[Line]) -> None:
        """Begin as many as there are places. Those of batches that end meanwhile are dropped."""
        begun: list[Line] = []
        places = self._places(waiting)
        while waiting and len(begun) < places and not (begun and waiting[0].attempts):
            line = waiting.popleft()
            live = self._lanes.live.get(line.batch)
            if live is not None and live.begins_lines:
                live.running += 1  # from now on its batch waits for it
                begun.append(line)
        if not begun:
            return
        try:
            await asyncio.to_thread(self._lanes.store.begin, begun)
        except BaseException:
            for line in begun:
                self._ended(line)
            raise
        for line in begun:
            self._running[asyncio.create_task(self._run_line(line))] = line

    async def _run_line(self, line: Line) -> None:
        try:
            await self._lanes.runner.run(self._lanes.live[line.batch], line, self._lanes.store)
        finally:
            self._ended(line)

    def _ended(self, line: Line) -> None:
        live = self._lanes.live[line.batch]
        live.running -= 1
        self._lanes.on_line_end(live)

    async def _gap(self) -> None:
        """Wait until nobody else needs the device, nor the models that must leave it."""
        engine, settings = self._lanes.engine, self._lanes.settings
        while True:
            await engine.activity.idle_for(settings.batch_idle)
            if self._running or self._lanes.is_there(self._group):
                return
            try:
                forecast = await engine.plan(self._group, priority=Priority.BATCH)
            except EngineError:
                return  # the line itself reports what is wrong
            if all(
                engine.activity.unused_s(each.model) >= settings.batch_evict_idle
                and each.reason != "in use"
                for each in forecast.evictions
            ):
                return
            await asyncio.sleep(LOOK_S)
