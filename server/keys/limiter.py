"""The limits of a key: requests and tokens a minute, and requests at once.

All of it is in memory and takes the same time whatever came before. A restart begins anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

RETRY_CONCURRENT_S = 1.0
"""When to try again if too many requests run: nobody knows when one ends."""

RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{part}-{what}"
    for what in ("requests", "tokens")
    for part in ("limit", "remaining", "reset")
)
"""All that a limiter may give."""

Clock = Callable[[], float]
"""Seconds from any moment on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may do; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not begin now."""

    message: str
    retry_after_s: float


class Bucket:
    """A token bucket. It holds the amount of a minute, and fills at that pace.

    Its level may be below zero: what is owed is paid back by waiting.
    """

    __slots__ = ("_at_s", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now

    def level(self, now: float) -> float:
        """What may be taken now."""
        filled = (now - self._at_s) * self.per_minute / 60
        self._level = min(float(self.per_minute), self._level + filled)
        self._at_s = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take that much, even if it is not there."""
        self._level = self.level(now) - amount

    def resize(self, per_minute: int, now: float) -> None:
        """Hold another amount from now on. What was taken stays taken."""
        self._level = self.level(now) + per_minute - self.per_minute
        self.per_minute = per_minute

    def wait_s(self, level: float, now: float) -> float:
        """Seconds until it holds so much."""
        return max(0.0, (level - self.level(now)) * 60 / self.per_minute)

    def headers(self, what: str, now: float) -> dict[str, str]:
        """OpenAI's three headers about `what`."""
        return {
            f"x-ratelimit-limit-{what}": str(self.per_minute),
            f"x-ratelimit-remaining-{what}": str(max(0, math.floor(self.level(now)))),
            f"x-ratelimit-reset-{what}": format_reset(self.wait_s(self.per_minute, now)),
        }


class Limiter:
    """Counts what a key does. Belongs to one event loop."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._concurrent: int | None = None
        self._running = 0
        self.set(limits)

    def set(self, limits: Limits) -> None:
        """Take other limits. What was used stays used."""
        now = self._clock()
        self._requests = _resized(self._requests, limits.requests_per_minute, now)
        self._tokens = _resized(self._tokens, limits.tokens_per_minute, now)
        self._concurrent = limits.concurrent

    @property
    def running(self) -> int:
        """Requests that have entered and not left."""
        return self._running

    def enter(self) -> Refusal | None:
        """Begin a request, which must leave later. A refused one takes nothing."""
        now = self._clock()
        if self._concurrent is not None and self._running >= self._concurrent:
            return Refusal(
                f"Rate limit reached: {self._concurrent} requests of this key run at once,"
                " as many as it may have.",
                RETRY_CONCURRENT_S,
            )
        requests, tokens = self._requests, self._tokens
        if tokens is not None and tokens.level(now) <= 0:
            return Refusal(
                f"Rate limit reached: this key has {tokens.per_minute} tokens a minute,"
                " and they are used up.",
                tokens.wait_s(0, now),
            )
        if requests is not None:
            if requests.level(now) < 1:
                return Refusal(
                    f"Rate limit reached: this key has {requests.per_minute} requests a minute,"
                    " and they are used up.",
                    requests.wait_s(1, now),
                )
            requests.take(1, now)
        self._running += 1
        return None

    def leave(self) -> None:
        """End a request."""
        self._running -= 1

    def count_tokens(self, tokens: int) -> None:
        """Charge the tokens of a request that has ended."""
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    def headers(self) -> dict[str, str]:
        """OpenAI's headers of the limits that there are."""
        now = self._clock()
        headers: dict[str, str] = {}
        if self._requests is not None:
            headers |= self._requests.headers("requests", now)
        if self._tokens is not None:
            headers |= self._tokens.headers("tokens", now)
        return headers


class Turn:
    """One request before a limiter. It leaves once, however often it is told to."""

    __slots__ = ("_entered", "_limiter")

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._entered = False

    def enter(self) -> Refusal | None:
        """Begin the request, or say why not."""
        refusal = self._limiter.enter()
        self._entered = refusal is None
        return refusal

    def leave(self) -> None:
        """End the request, if it has begun."""
        if self._entered:
            self._entered = False
            self._limiter.leave()

    def headers(self) -> dict[str, str]:
        """The headers of its answer."""
        return self._limiter.headers()


def format_reset(seconds: float) -> str:
    """A duration as OpenAI writes it: `0s`, `20ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`."""
    ms = math.ceil(round(seconds * 1000, 6))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    if hours or minutes:
        text += f"{minutes}m"
    return f"{text}{ms / 1000:g}s"


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket
