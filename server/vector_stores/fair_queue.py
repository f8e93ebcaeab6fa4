"""A queue in which no key waits for all that another has put in."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class FairQueue:
    """Numbers of files. The keys take turns; the files of one key keep their order."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[int]] = OrderedDict()
        self._ready = asyncio.Semaphore(0)

    def put(self, key: str, number: int) -> None:
        """Add the file that a key wants to have read."""
        self._waiting.setdefault(key, deque()).append(number)
        self._ready.release()

    async def get(self) -> int:
        """Take the next file of the key that has waited longest for a turn."""
        await self._ready.acquire()
        key, numbers = self._waiting.popitem(last=False)
        number = numbers.popleft()
        if numbers:
            self._waiting[key] = numbers
        return number
