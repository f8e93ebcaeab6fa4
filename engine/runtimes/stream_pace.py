"""How many tokens an event of a stream carries.

Every event costs the event loop about the same, however many tokens are in it: building the
chunk, framing and sending it. The loop shares the interpreter with the thread that steps the
models, so with many streams events of one token each are what holds up the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_TOKENS = 4
STREAMS_PER_TOKEN = 32
"""So many streams for each token of an event, rounded up. Measured on two cores: with 16 streams
a second token gave nothing, with 64 it gave 2-30 % more tokens a second and more of them no more;
with 256 four gave 25-40 %."""

BUSY = 0.25
IDLE = 0.10
"""Shares of the loop's time above and below which events get longer and shorter. Twice the tokens
make about half the work, so that one share does not lead to the other and back."""

OBSERVED_S = 0.25


class StreamPace:
    """The number of tokens an event should have now. For one event loop; not thread-safe."""

    def __init__(
        self,
        wall: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.thread_time,
    ) -> None:
        """`busy` tells the processor seconds that the calling thread, the loop's, has used."""
        self.streams = 0
        """Answers that are streamed at this moment."""
        self._wall = wall
        self._busy = busy
        self._since_s = 0.0
        self._busy_s = 0.0
        self._tokens = 1

    @property
    def tokens(self) -> int:
        """How many tokens an event should wait for; at least 1."""
        return min(self._tokens, 1 + max(0, self.streams - 1) // STREAMS_PER_TOKEN)

    def observe(self) -> None:
        """Look at what the loop has done lately. Called on it, with every step's outputs."""
        now_s = self._wall()
        passed_s = now_s - self._since_s
        if passed_s < OBSERVED_S:
            return
        busy_s = self._busy()
        share = (busy_s - self._busy_s) / passed_s
        self._since_s, self._busy_s = now_s, busy_s
        if share > BUSY:
            self._tokens = min(self.tokens + 1, MAX_TOKENS)
        elif share < IDLE:
            self._tokens = max(self.tokens - 1, 1)


PACE = StreamPace()
"""There is one event loop, so there is one pace for the streams of all models."""
