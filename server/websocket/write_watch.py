"""Gives up the connection of a client that does not read."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

logger = logging.getLogger(__name__)


class WriteWatch:
    """A base of a protocol. It watches the write buffer of one connection while it is full.

    The connection is cut once its client has taken no byte for `watch_s` seconds although some wait
    for it. A client that reads slowly is served, however long that takes.
    """

    watch_s: float
    transport: Any
    _watch: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The buffer is full: called by the transport."""
        super().pause_writing()  # type: ignore[misc]
        self._check_later(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken enough: called by the transport."""
        super().resume_writing()  # type: ignore[misc]
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self._stop_watching()
        super().connection_lost(exc)  # type: ignore[misc]

    def _check_later(self, left_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self.watch_s, self._check, left_bytes)

    def _check(self, before_bytes: int) -> None:
        # Nothing is added while writing is paused, so a client that reads makes it smaller.
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes < before_bytes:
            self._check_later(left_bytes)
            return
        self._watch = None
        logger.warning("a client has read nothing for %g s; it is cut off", self.watch_s)
        self.transport.abort()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
