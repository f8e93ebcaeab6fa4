"""Where answers are kept: what the cache needs of SQLite or Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from server.response_cache.entry import Entry

MAX_ENTRY_BYTES = 32 * 2**20
"""The largest answer that is kept: ten images, or half an hour of speech."""

MAX_PENDING_BYTES = 64 * 2**20
"""Bytes of answers that may wait to be written. Beyond, an answer is not kept."""

Encode: TypeAlias = Callable[[], bytes | None]
"""Makes the bytes of an entry, on a thread. None if it must not be kept after all."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a store holds."""

    entries: int
    nbytes: int


NOTHING = Kept(0, 0)


class Store(Protocol):
    """Keeps entries by key. No method but `clear` raises: a store that fails has no entry."""

    kind: str
    """Its name for people."""

    @property
    def max_entry_bytes(self) -> int:
        """The largest entry that it takes."""

    @property
    def off_reason(self) -> str | None:
        """Why it keeps nothing any more, in words; None while it works."""

    def kept(self) -> Kept | None:
        """What it holds; None if it does not know."""

    async def start(self) -> None:
        """Open it."""

    async def get(self, key: bytes) -> Entry | None:
        """The entry of a key, if there is one that is whole and not too old."""

    def put(self, key: bytes, nbytes: int, encode: Encode) -> None:
        """Keep an entry of about `nbytes` bytes, soon. Returns at once."""

    async def clear(self) -> int:
        """Remove all entries; returns how many there were.

        Raises:
            EngineError: they could not be removed.

        """

    async def close(self) -> None:
        """Write what waits, and close it."""
