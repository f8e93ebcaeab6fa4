"""The exit statuses of the command line and of the processes that serve.

Standard library only, as the supervisor imports it.
"""

from __future__ import annotations

FAILED = 1
"""The command could not do its work, or the engine could not start."""
BAD_CONFIG = 2
"""The configuration or the command line is wrong. Another start would fail too."""
FAULT = 70
"""The process can serve no request any more (sysexits.h: EX_SOFTWARE)."""
INTERRUPTED = 130
"""Ended by Ctrl-C: 128 + SIGINT, as shells count."""
TERMINATED = 143
"""Ended by SIGTERM: 128 + SIGTERM."""
