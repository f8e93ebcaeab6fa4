"""The circuit breaker of a provider: calls that would fail anyway are not made.

The packages that there are do without what is needed here: they wrap one call of a function, while
the outcome of a stream is known at its end, and they know failures in a row but no failure rate.
They also keep their state in clocks of their own. So this one is ours, and pure but for its clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import StrEnum

FAILURES_IN_A_ROW = 5
"""So many failures in a row open it."""

FAILURE_RATE = 0.5
LEAST_CALLS = 20
WINDOW_S = 60.0
"""A share of `FAILURE_RATE` among at least `LEAST_CALLS` calls of this time opens it as well."""

FIRST_OPEN_S = 10.0
LONGEST_OPEN_S = 120.0
"""How long it stays open: twice as long after each probe that fails."""


class BreakerState(StrEnum):
    """What becomes of a call."""

    CLOSED = "closed"
    """It is made."""
    OPEN = "open"
    """It is refused."""
    HALF_OPEN = "half_open"
    """The next one is a probe, and all others are refused until it has answered."""


class Passage:
    """A call that was let through. Exactly one of its ends is reported."""

    __slots__ = ("_breaker", "_over", "_probe")

    def __init__(self, breaker: Breaker, *, probe: bool) -> None:
        self._breaker = breaker
        self._probe = probe
        self._over = False

    def answered(self) -> None:
        """The provider has begun to answer. That is all that a probe asks for."""
        if self._probe:
            self._probe = False
            self._breaker._close()

    def succeeded(self) -> None:
        """The answer was whole, or its reader had enough of it."""
        if not self._over:
            self.answered()
            self._end(True)

    def failed(self) -> None:
        """There was no answer, or it broke off."""
        if not self._over:
            self._end(False)

    def abandoned(self) -> None:
        """Nobody wants to know any more: the call says nothing of the provider."""
        if not self._over:
            self._over = True
            if self._probe:
                self._breaker._give_probe_back()

    def _end(self, ok: bool) -> None:
        self._over = True
        self._breaker._count(ok, probe=self._probe)


class Breaker:
    """Opens when calls fail, and closes when a probe is answered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._in_a_row = 0
        self._open_until: float | None = None
        self._open_s = FIRST_OPEN_S
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """What would become of a call now."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._open_until else BreakerState.HALF_OPEN

    @property
    def refused_s(self) -> float:
        """Seconds until a call may be let through; 0: now."""
        if self._open_until is None:
            return 0.0
        left_s = self._open_until - self._clock()
        return left_s if left_s > 0 else float(self._probing)

    @property
    def error_rate(self) -> float | None:
        """The share of failures among the calls of the last minute; None without calls."""
        self._forget()
        if not self._outcomes:
            return None
        return sum(not ok for _, ok in self._outcomes) / len(self._outcomes)

    def let_through(self) -> Passage | None:
        """A passage, or None: the call is refused."""
        if self.refused_s > 0:
            return None
        probe = self._open_until is not None
        self._probing = self._probing or probe
        return Passage(self, probe=probe)

    def _close(self) -> None:
        self._open_until = None
        self._probing = False
        self._open_s = FIRST_OPEN_S
        self._in_a_row = 0
        self._outcomes.clear()  # what opened it must not open it again

    def _give_probe_back(self) -> None:
        self._probing = False

    def _count(self, ok: bool, *, probe: bool) -> None:
        now = self._clock()
        self._outcomes.append((now, ok))
        self._in_a_row = 0 if ok else self._in_a_row + 1
        if probe:
            self._probing = False
            self._open_s = min(LONGEST_OPEN_S, 2 * self._open_s)
            self._open_until = now + self._open_s
        elif not ok and self._open_until is None and self._is_failing():
            self._open_until = now + self._open_s

    def _is_failing(self) -> bool:
        self._forget()
        if self._in_a_row >= FAILURES_IN_A_ROW:
            return True
        rate = self.error_rate or 0.0
        return len(self._outcomes) >= LEAST_CALLS and rate >= FAILURE_RATE

    def _forget(self) -> None:
        oldest = self._clock() - WINDOW_S
        while self._outcomes and self._outcomes[0][0] < oldest:
            self._outcomes.popleft()
