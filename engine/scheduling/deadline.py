"""How long a request may still wait, in all its waits together."""

from __future__ import annotations

from collections.abc import Callable


class Deadline:
    """One limit for the start of the engine, the files, and every turn in the queue.

    The seconds in which the request runs do not count: a run that is tried again has left what it
    had left before.
    """

    def __init__(self, clock: Callable[[], float], timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._waited_s = 0.0
        self._waits_since: float | None = clock()

    @property
    def waited_s(self) -> float:
        """Seconds of all waits so far."""
        since = self._waits_since
        return self._waited_s + (0.0 if since is None else self._clock() - since)

    @property
    def left_s(self) -> float:
        """Seconds that it may still wait; at least 0."""
        return max(0.0, self._timeout_s - self.waited_s)

    def stop(self) -> None:
        """The request runs from now on."""
        self._waited_s, self._waits_since = self.waited_s, None

    def go_on(self) -> None:
        """The request waits again."""
        if self._waits_since is None:
            self._waits_since = self._clock()
