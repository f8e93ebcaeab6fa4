"""How much a provider takes: as the configuration says, and as the provider itself says."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from engine.units import parse_duration

MINUTE_S = 60.0

MOST_BELIEVED_S = 60.0
"""How long a count of 0 in a header keeps requests back. Beyond that one is tried: an answer of 429
says the truth."""

USUAL_RETRY_S = 5.0
"""After a 429 that does not say when to come again."""

LONGEST_RETRY_S = 3600.0


@dataclass(slots=True)
class Taken:
    """What one request takes of a minute."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class LimitsLeft:
    """What is left of the limits; None where nobody has said."""

    requests: int | None
    tokens: int | None
    blocked_s: float
    """Seconds until the provider takes requests again."""


class RateLimits:
    """The limits of one model at its provider."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests_per_minute
        self._tokens = tokens_per_minute
        self._clock = clock
        self._taken: deque[Taken] = deque()
        self._blocked_until = -math.inf
        self._said_requests: int | None = None
        self._said_tokens: int | None = None

    def wait_s(self, tokens: int) -> float:
        """Seconds until a request of some `tokens` may be sent; 0: now.

        One that takes more than a whole minute may is sent when the minute is empty.
        """
        now = self._clock()
        self._forget(now)
        wait_s = max(0.0, self._blocked_until - now)
        if self._requests is not None and len(self._taken) >= self._requests:
            oldest = self._taken[len(self._taken) - self._requests]
            wait_s = max(wait_s, oldest.at + MINUTE_S - now)
        if self._tokens is not None:
            room = self._tokens - tokens
            held = sum(each.tokens for each in self._taken)
            for each in self._taken:
                if held <= room:
                    break
                held -= each.tokens
                wait_s = max(wait_s, each.at + MINUTE_S - now)
        return wait_s

    def take(self, tokens: int) -> Taken:
        """Count a request that is sent now. Its tokens are set once they are known."""
        taken = Taken(self._clock(), tokens)
        if self._requests is not None or self._tokens is not None:
            self._taken.append(taken)
        return taken

    def block(self, seconds: float) -> None:
        """Send nothing for so long."""
        self._blocked_until = max(self._blocked_until, self._clock() + seconds)

    def read(self, headers: Mapping[str, str]) -> None:
        """Take what the headers of an answer say of the limits."""
        for what in ("requests", "tokens"):
            left = _count(headers.get(f"x-ratelimit-remaining-{what}"))
            if left is None:
                continue
            if what == "requests":
                self._said_requests = left
            else:
                self._said_tokens = left
            reset_s = _seconds(headers.get(f"x-ratelimit-reset-{what}"))
            if left <= 0 and reset_s is not None:
                self.block(min(reset_s, MOST_BELIEVED_S))

    @property
    def left(self) -> LimitsLeft:
        """What is left now."""
        now = self._clock()
        self._forget(now)
        requests, tokens = self._said_requests, self._said_tokens
        if self._requests is not None:
            requests = _least(requests, max(0, self._requests - len(self._taken)))
        if self._tokens is not None:
            held = sum(each.tokens for each in self._taken)
            tokens = _least(tokens, max(0, self._tokens - held))
        return LimitsLeft(requests, tokens, max(0.0, self._blocked_until - now))

    def _forget(self, now: float) -> None:
        while self._taken and self._taken[0].at <= now - MINUTE_S:
            self._taken.popleft()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """When to come again by the headers of an answer, in seconds from now; None: they do not say.

    OpenAI and Azure also send milliseconds. HTTP allows a date.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(LONGEST_RETRY_S, milliseconds / 1e3)
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is None:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = max(0.0, (date - datetime.now(UTC)).total_seconds())
    return min(LONGEST_RETRY_S, seconds)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _count(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _seconds(text: str | None) -> float | None:
    """`6m0s`, `1.2s`, `120ms`, or a number of seconds."""
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _least(one: int | None, other: int) -> int:
    return other if one is None else min(one, other)
