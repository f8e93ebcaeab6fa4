"""What a request took and gave, in the units in which providers bill it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """Counts of one request. They grow while it runs, so that a cancelled one has what it took."""

    input_tokens: int = 0
    cached_tokens: int = 0
    """Of the input tokens, those that a prefix cache had."""
    output_tokens: int = 0
    characters: int = 0
    """Of a text that was spoken."""
    spoken_s: float = 0.0
    """Seconds of the speech."""
    heard_s: float = 0.0
    """Seconds of a recording that was transcribed."""
    images: int = 0
    pixels: int = 0
    """Of one image or frame."""
    video_s: float = 0.0
    device_s: float = 0.0
    """Seconds of this machine's device. Runs at the same time share them."""
    price: float | None = None
    """Dollars, where the provider said so itself."""


COUNTED: ContextVar[Usage | None] = ContextVar("counted", default=None)
"""Where a library's own code, called from a run, counts what it does for it."""
