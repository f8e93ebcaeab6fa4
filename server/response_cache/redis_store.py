"""Answers in Redis, which several servers may share. Redis bounds their age and their size."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import ConfigError, Overloaded
from server.response_cache.entry import Entry
from server.response_cache.store import MAX_ENTRY_BYTES, MAX_PENDING_BYTES, Encode

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

PREFIX = b"roundhouse:response:"
"""Begins the name of each of our keys."""

READ_LIMIT_S = 0.05
"""How long a request waits for Redis. Then it is a miss."""
WRITE_LIMIT_S = 2.0
CLEAR_LIMIT_S = 60.0
PAUSE_S = 1.0
"""How long nobody asks a Redis that has failed. Otherwise each request would wait for it."""
LARGE_BYTES = 2**16
"""From so many bytes an entry is decoded on a thread."""
REMOVED_AT_ONCE = 500


class RedisStore:
    """Keeps entries in a Redis. One that is away or slow has no entries: a warning says so once."""

    kind = "redis"
    max_entry_bytes = MAX_ENTRY_BYTES

    def __init__(
        self,
        url: str,
        max_age_s: float,
        *,
        read_limit_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects with the first request. `url` may hold a password, so it is never shown.

        `read_limit_s` is `READ_LIMIT_S` by default.

        Raises:
            ConfigError: the package `redis` is not installed, or the URL is wrong.

        """
        if importlib.util.find_spec("redis") is None:
            raise ConfigError(
                "server.response_cache: Redis needs a package: pip install 'roundhouse[redis]'"
            )
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_connect_timeout=WRITE_LIMIT_S,
                socket_timeout=WRITE_LIMIT_S,
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"server.response_cache: {type(error).__name__} in the URL") from None
        self._errors = (RedisError, OSError, TimeoutError)
        # Redis takes whole milliseconds, and no age for ever.
        self._max_age_ms = max(1, int(max_age_s * 1000)) if math.isfinite(max_age_s) else None
        self._read_limit_s = READ_LIMIT_S if read_limit_s is None else read_limit_s
        self._clock = clock
        self._paused_until = -math.inf
        self._failing = False
        self._pending_bytes = 0
        self._writes: set[asyncio.Task[None]] = set()

    @property
    def off_reason(self) -> None:
        """It is never off for good."""
        return None

    def kept(self) -> None:
        """Only Redis knows, and not without a search."""
        return None

    async def start(self) -> None:
        """Nothing: a Redis that comes later is as good."""

    async def get(self, key: bytes) -> Entry | None:
        """The entry of a key, if Redis has it and gives it in time."""
        if self._clock() < self._paused_until:
            return None
        try:
            async with asyncio.timeout(self._read_limit_s):
                raw = await self._redis.get(PREFIX + key.hex().encode())
        except self._errors as error:
            self._failed(error)
            return None
        self._worked()
        if not isinstance(raw, bytes):
            return None  # there is none
        entry = await _decode(key, raw)
        if entry is None:
            log.warning("an answer in Redis is damaged; it is not used")
        return entry

    def put(self, key: bytes, nbytes: int, encode: Encode) -> None:
        """Keep an entry, soon."""
        if self._clock() < self._paused_until or self._pending_bytes + nbytes > MAX_PENDING_BYTES:
            return
        self._pending_bytes += nbytes
        task = asyncio.create_task(self._put(key, encode))
        self._writes.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._pending_bytes -= nbytes
            self._writes.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("an answer could not be kept", exc_info=error)

        task.add_done_callback(done)

    async def clear(self) -> int:
        """Remove all entries with our prefix.

        Raises:
            Overloaded: Redis does not answer.

        """
        removed = 0
        try:
            async with asyncio.timeout(CLEAR_LIMIT_S):
                names: list[bytes] = []
                async for name in self._redis.scan_iter(match=PREFIX + b"*", count=REMOVED_AT_ONCE):
                    names.append(name)
                    if len(names) == REMOVED_AT_ONCE:
                        removed += await self._redis.unlink(*names)
                        names.clear()
                if names:
                    removed += await self._redis.unlink(*names)
        except self._errors as error:
            self._failed(error)
            raise Overloaded("Redis does not answer.", retry_after_s=PAUSE_S) from None
        self._worked()
        return removed

    async def close(self) -> None:
        """Let what is being written arrive, and disconnect."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=WRITE_LIMIT_S)
        for task in self._writes:
            task.cancel()
        await self._redis.aclose()

    async def _put(self, key: bytes, encode: Encode) -> None:
        content = await asyncio.to_thread(encode)
        if content is None:
            return
        try:
            async with asyncio.timeout(WRITE_LIMIT_S):
                await self._redis.set(PREFIX + key.hex().encode(), content, px=self._max_age_ms)
        except self._errors as error:
            self._failed(error)
        else:
            self._worked()

    def _failed(self, error: BaseException) -> None:
        self._paused_until = self._clock() + PAUSE_S
        if not self._failing:
            self._failing = True
            # The words of a library may hold the address, and that a password.
            reason = "it is too slow" if isinstance(error, TimeoutError) else type(error).__name__
            log.warning("the response cache does without Redis until it answers: %s", reason)

    def _worked(self) -> None:
        if self._failing:
            self._failing = False
            log.info("Redis answers again")


async def _decode(key: bytes, raw: bytes) -> Entry | None:
    if len(raw) < LARGE_BYTES:
        return Entry.decode(key, raw)
    return await asyncio.to_thread(Entry.decode, key, raw)
