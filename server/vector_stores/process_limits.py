"""The limits of a process that reads one file for the server."""

from __future__ import annotations

import resource

MAX_MEMORY_BYTES = 2 * 2**30
MAX_CPU_S = 120
"""The server that waits may be gone: then this ends the process."""


def limit_this_process() -> None:
    """Let the kernel end this process before it takes more."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
