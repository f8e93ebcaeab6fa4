"""The rest of a run after its first event, and the lease that it holds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from engine.events import Event
from engine.process.endings import wait_for_end
from engine.scheduling.lease import Lease

AHEAD_S = 0.25
"""A consumer that takes longer with one event no longer decides how long the run takes."""


class Run:
    """Hands the events of a run over one by one. The lease ends with the run, not with the reader.

    A client that reads slowly must not keep a model from others. So while the consumer is busy
    with an event for `AHEAD_S`, the rest of the run is read ahead, at the pace of the model.
    """

    def __init__(self, events: AsyncGenerator[Event, None], lease: Lease) -> None:
        self._events = events
        self._lease = lease
        self._given = 0
        """Events that the consumer got so far."""
        self._busy_with: int | None = None
        """The number of the event that the consumer is busy with."""
        self._timer: asyncio.TimerHandle | None = None
        self._ahead: asyncio.Task[None] | None = None
        self._read: deque[Event] = deque()
        self._error: Exception | None = None
        self._ended = False
        """All was read ahead."""
        self._more = asyncio.Event()

    async def next(self) -> Event | None:
        """The next event; None once the run has ended.

        Raises:
            EngineError: the run failed.

        """
        self._busy_with = None
        if self._ahead is not None:
            return await self._next_read()
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            self._lease.release()
            return None
        except Exception:
            self._lease.release()
            raise

    def give(self) -> None:
        """The consumer gets an event now, and is busy with it until it calls `next`."""
        self._given += 1
        self._busy_with = self._given
        if self._timer is None and self._ahead is None:
            self._check_later()

    async def close(self) -> None:
        """Stop what still runs and end the lease."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            if self._ahead is not None:
                self._ahead.cancel()
                await wait_for_end(self._ahead)
            await self._events.aclose()
        finally:
            self._lease.release()

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(AHEAD_S, self._check, self._busy_with)

    def _check(self, busy_with: int | None) -> None:
        """Read ahead if the consumer is still busy with the same event."""
        if busy_with is not None and busy_with == self._busy_with:
            self._timer = None
            self._ahead = asyncio.get_running_loop().create_task(self._read_on())
        else:
            self._check_later()

    async def _read_on(self) -> None:
        try:
            async for event in self._events:
                self._read.append(event)
                self._more.set()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._lease.release()
            self._more.set()

    async def _next_read(self) -> Event | None:
        while not self._read:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._more.clear()
            await self._more.wait()
        return self._read.popleft()
