"""What a database of vectors does: the one interface of both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors: TypeAlias = NDArray[np.float32]
    """Vectors of length 1: (passages, dimensions), or one of them."""
    Numbers: TypeAlias = NDArray[np.int64]

MAX_DIMENSIONS = 8192
"""Of sqlite-vec. pgvector takes 16,000."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a file."""

    attachment: int
    """The number of the file in its store. A file that is attached anew has another."""
    ordinal: int
    """Its place in the file: 0, 1, …"""
    text: str


@dataclass(frozen=True, slots=True)
class Near:
    """A passage that a search has found."""

    passage: int
    """Its id."""
    attachment: int
    score: float
    """The cosine of the angle between it and the query."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """All vectors of a store."""

    passages: Numbers
    attachments: Numbers
    vectors: Vectors


class Backend(Protocol):
    """Keeps passages and their vectors by store and attachment. Threads may share it.

    Every method blocks, and what it writes is on disk when it returns. An attachment is there as a
    whole or not at all.
    """

    def add(
        self, store: str, attachment: int, texts: Sequence[str], vectors: Vectors
    ) -> Sequence[int]:
        """Keep the passages of a file; their ids.

        Raises:
            Conflict: the store has vectors of other dimensions.
            NoSpaceLeft: the disk is full.

        """

    def remove(self, store: str, attachment: int) -> None:
        """Forget the passages of a file, if there are any."""

    def drop(self, store: str) -> None:
        """Forget a store, if it is there."""

    def size(self, store: str) -> tuple[int, int]:
        """The vectors of a store and their dimensions; zeros if there are none."""

    def load(self, store: str) -> Loaded:
        """All vectors of a store, by the ids of their passages."""

    def nearest(
        self, store: str, vector: Vectors, most: int, among: Collection[int] | None
    ) -> list[Near]:
        """The passages nearest to a vector, exactly; `among` are the attachments that count."""

    def read(self, passages: Collection[int]) -> Mapping[int, Passage]:
        """Passages by their ids. One that is gone is missing."""

    def texts(self, store: str, attachment: int) -> list[str]:
        """The passages of a file, in order."""

    def close(self) -> None:
        """Close what is open."""
