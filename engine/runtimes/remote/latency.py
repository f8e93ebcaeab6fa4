"""How long a provider takes to its first byte, and how long to wait for it."""

from __future__ import annotations

from collections import deque

SAMPLES = 200
"""The window: so many of the last answers."""

LEAST_SAMPLES = 10
"""With fewer answers nobody can say what is usual."""

FACTOR = 1.5
"""The timeout is the 95th percentile times this."""


class Latency:
    """The seconds to the first byte of the last answers."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)

    def add(self, seconds: float) -> None:
        """Take an answer, or a timeout as an answer that took so long.

        Otherwise a provider that has become slower would be cut off for ever.
        """
        self._samples.append(seconds)

    def percentile(self, share: float) -> float | None:
        """The seconds within which that share of answers came (nearest rank); None without any."""
        if not self._samples:
            return None
        ordered = sorted(self._samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def timeout_s(self, least_s: float, most_s: float) -> float:
        """How long to wait for the first byte of the next."""
        usual = self.percentile(0.95)
        if usual is None or len(self._samples) < LEAST_SAMPLES:
            return most_s
        return min(most_s, max(least_s, FACTOR * usual))
