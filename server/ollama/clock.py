"""Times as Ollama writes them."""

from __future__ import annotations

from datetime import UTC, datetime


def written(seconds: float) -> str:
    """Unix seconds as text, as in `2026-11-28T22:03:00.123456Z`."""
    time = datetime.fromtimestamp(seconds, UTC)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")
