"""When the engine has last worked for somebody who waits, so that batches can use the gaps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Activity:
    """Counts the requests that are not of priority `batch`. Lives on the engine's event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._running = 0
        self._ended_at = -math.inf
        self._used_at: dict[str, float] = {}
        self._quiet: asyncio.Event | None = None
        """Set when the last request ends; None while nobody waits for that."""

    def begin(self) -> None:
        """A request waits or runs from now on."""
        self._running += 1

    def end(self, model: str) -> None:
        """A request has ended; `model` served it, and is empty where none did."""
        self._running -= 1
        self._ended_at = self._clock()
        if model:
            self._used_at[model] = self._ended_at
        if not self._running and self._quiet is not None:
            self._quiet.set()
            self._quiet = None

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self._running > 0

    def unused_s(self, model: str) -> float:
        """Seconds since the model served a request; infinite if it never did."""
        return self._clock() - self._used_at.get(model, -math.inf)

    async def idle_for(self, seconds: float) -> None:
        """Return once no request has waited or run for so many seconds."""
        while True:
            if self._running:
                if self._quiet is None:
                    self._quiet = asyncio.Event()
                await self._quiet.wait()
            left_s = self._ended_at + seconds - self._clock()
            if not self._running and left_s <= 0:
                return
            if not self._running:
                await asyncio.sleep(left_s)
