"""What models make of recordings of voices, kept for the next request of the same voice."""

from __future__ import annotations

import wave
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import InvalidRequest
from engine.media.voices import SAMPLE_RATE

MAX_CLONES = 64
"""Cloned voices of a model that stay in host memory, at most 130 KB each (XTTS v2). Beyond that,
the least recently used voice goes."""

MadeT = TypeVar("MadeT")


class Clones(Generic[MadeT]):
    """The last voices of a model. A changed file is another voice."""

    def __init__(self, make: Callable[[Path], MadeT]) -> None:
        """`make` reads a recording. What it returns is in host memory."""
        self._make = make
        self._made: OrderedDict[tuple[Path, int, int], MadeT] = OrderedDict()

    def get(self, recording: Path) -> MadeT:
        """What `make` returns for the recording.

        Raises:
            InvalidRequest: it cannot be read.

        """
        try:
            stat = recording.stat()
            key = (recording, stat.st_mtime_ns, stat.st_size)
            if key not in self._made:
                self._made[key] = self._make(recording)
        except (OSError, wave.Error, EOFError) as error:
            raise _unreadable() from error
        self._made.move_to_end(key)
        while len(self._made) > MAX_CLONES:
            self._made.popitem(last=False)
        return self._made[key]


def recording_s(recording: Path) -> float:
    """Seconds of a recording as the voice store keeps it, from its bytes.

    Raises:
        InvalidRequest: it is gone.

    """
    try:
        return recording.stat().st_size / (2 * SAMPLE_RATE)
    except OSError as error:
        raise _unreadable() from error


def _unreadable() -> InvalidRequest:
    return InvalidRequest("The recording of this voice cannot be read.", param="voice")
