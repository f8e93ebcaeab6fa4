"""When the tokens of a stream make an event.

Every event costs the event loop about the same, whatever the number of its tokens: the loop builds
the chunk, frames it and sends it. The loop shares the interpreter with the thread that steps the
models, so events of one token each hold up the steps. Tokens within one frame of a display look
simultaneous to a reader anyway, and tokens within a tenth of a second nearly so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

FRAME_S = 1 / 60
"""Events follow each other no closer than the frames of a common display. Measured on two cores: a
single stream has a tenth more tokens a second than with an event for each token."""
HOLD_S = 0.1
"""How long an event waits for its tokens while the loop is busy. Below this limit a reply feels
instantaneous (Nielsen, Response Times: The 3 Important Limits)."""
CROWD = 64
"""With more streams than this, an event waits longer in proportion: the tokens of each stream come
later. Measured on two cores with 256 streams: four tokens an event gave 25-40 % more tokens a
second than one."""

MAX_TOKENS = 8
STREAMS_PER_TOKEN = 2
"""An event waits for one token for every so many streams: few streams do not keep the loop busy.
Measured on two cores with 16 and 64 streams, against at most one token for 32 streams: 15-20 % more
tokens a second. With at most 50 ms an event, 64 streams gained less than half of that."""

BUSY = 0.12
IDLE = 0.05
"""Shares of the loop's time above and below which events get longer and shorter. Twice the tokens
make about half the work, so the pace does not swing between the two."""

OBSERVED_S = 0.25


class StreamPace:
    """Says when an event is due. For one event loop; not thread-safe."""

    def __init__(
        self,
        wall: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.thread_time,
    ) -> None:
        """`busy` returns the processor seconds of the calling thread, which is the loop's."""
        self.streams = 0
        """Answers that are streamed now."""
        self._wall = wall
        self._busy = busy
        self._since_s = 0.0
        self._busy_s = 0.0
        self._tokens = 1

    @property
    def tokens(self) -> int:
        """Number of tokens that an event should wait for, at least 1."""
        return min(self._tokens, max(1, self.streams // STREAMS_PER_TOKEN))

    def now_s(self) -> float:
        """Seconds on the clock of `due`."""
        return self._wall()

    def due(self, tokens: int, sent_s: float) -> bool:
        """Whether so many tokens make an event now, if the last event was sent at `sent_s`."""
        passed_s = self._wall() - sent_s
        if passed_s < FRAME_S:
            return False
        hold_s = HOLD_S * max(1.0, self.streams / CROWD)
        return tokens >= self.tokens or passed_s >= hold_s

    def observe(self) -> None:
        """Measure how busy the loop is. Call it on the loop, with the outputs of every step."""
        now_s = self._wall()
        passed_s = now_s - self._since_s
        if passed_s < OBSERVED_S:
            return
        busy_s = self._busy()
        share = (busy_s - self._busy_s) / passed_s
        self._since_s, self._busy_s = now_s, busy_s
        if share > BUSY:
            self._tokens = min(2 * self.tokens, MAX_TOKENS)
        elif share < IDLE:
            self._tokens = max(self.tokens // 2, 1)


PACE = StreamPace()
"""The pace of the streams of all models: there is one event loop."""

READ_BY_PARSER: ContextVar[bool] = ContextVar("read_by_parser", default=False)
"""Whether a parser of vLLM looks for tool calls or thoughts in the answer of the current task. Then
its tokens go one by one. Parsers read the tokens of an event together, and some lose or misplace
text beside a marker: `xlam` most of a call's arguments, `holo2` the mark before a thought."""
