"""The fair share of the device's time that each run has.

Runs on one device slow each other down, so the seconds of each alone would add up to more than
there were. When n runs share the device, each gets 1/n of the time. The clock V(t) = ∫ dt / n(t)
makes that cheap: a run's share is V(end) - V(begin), whatever else began and ended in between.
"""

from __future__ import annotations

from collections.abc import Callable


class DeviceTime:
    """Divides the time of one device among the runs on it. For one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._running = 0
        self._shared_s = 0.0
        """V: the seconds of a run that was there all the time."""

    @property
    def running(self) -> int:
        """The number of runs that share the device now."""
        return self._running

    def begin(self) -> Share:
        """A run begins. It ends with the share."""
        self._advance()
        self._running += 1
        return Share(self, self._shared_s)

    def end(self, began: float) -> float:
        """A run ends that began at `began` of this clock; its seconds."""
        self._advance()
        self._running -= 1
        return self._shared_s - began

    def _advance(self) -> None:
        now = self._clock()
        if self._running:
            self._shared_s += (now - self._at) / self._running
        self._at = now


class Share:
    """The device time of one run."""

    __slots__ = ("_began", "_device_time", "_seconds")

    def __init__(self, device_time: DeviceTime, began: float) -> None:
        self._device_time = device_time
        self._began = began
        self._seconds: float | None = None

    def end(self) -> float:
        """The run has ended; its seconds. A second call gives the same."""
        if self._seconds is None:
            self._seconds = self._device_time.end(self._began)
        return self._seconds
