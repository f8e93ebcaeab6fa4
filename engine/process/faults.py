"""The faults of this process: bugs of ours after which it must be replaced."""

from __future__ import annotations

import logging

from engine.errors import reason

log = logging.getLogger(__name__)


class Faults:
    """What has ended by an exception that nobody expected. Any thread may report.

    The health check reads it, the supervisor replaces the process. So a bug is never silent, and
    nobody waits for ever for what it broke.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        """The first fault, in words. Those after it may only follow from it."""

    def report(self, what: str, error: BaseException) -> None:
        """Note that `what` has ended by `error`."""
        log.critical("%s ended by a bug", what, exc_info=error)
        if self.first is None:
            self.first = f"{what} ended by a bug: {reason(error)}"

    def clear(self) -> None:
        """Forget all of them. For tests, which share one process."""
        self.first = None


FAULTS = Faults()
"""There is one process, so there is one list."""
