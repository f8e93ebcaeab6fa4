"""Vectors of stores in host memory, which one product with a matrix searches."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import Conflict
from server.vector_stores.backend import Backend, Loaded, Near, Passage

if TYPE_CHECKING:
    from server.vector_stores.backend import Vectors

_NUMBERS_BYTES = 16
"""Beside each vector: the ids of its passage and attachment."""


@dataclass(slots=True)
class _Matrix:
    """The vectors of one store. Rows behind `count` are room for more."""

    loaded: Loaded
    count: int

    @property
    def nbytes(self) -> int:
        found = self.loaded
        return found.vectors.nbytes + found.passages.nbytes + found.attachments.nbytes

    def view(self) -> Loaded:
        """The rows that are there. They never change, as others take their place in new arrays."""
        found = self.loaded
        end = self.count
        return Loaded(found.passages[:end], found.attachments[:end], found.vectors[:end])


class HeldVectors:
    """A backend before which matrices in memory answer, as far as they fit into `max_bytes`.

    The least recently used one leaves first. A store that does not fit at all is searched by the
    database. Both are exact. Threads may share it.
    """

    def __init__(self, backend: Backend, max_bytes: int) -> None:
        self._backend = backend
        self.max_bytes = max_bytes
        self._held: OrderedDict[str, _Matrix] = OrderedDict()
        self._lock = threading.Lock()
        """Held for moments, never during a call of the backend."""
        self._changing: dict[str, threading.Lock] = {}
        """Of each store: a matrix must not be loaded while the database changes."""

    @property
    def nbytes(self) -> int:
        """The bytes of the matrices."""
        with self._lock:
            return sum(matrix.nbytes for matrix in self._held.values())

    @property
    def backend(self) -> Backend:
        """The database."""
        return self._backend

    def close(self) -> None:
        """Forget the matrices, and close the backend."""
        with self._lock:
            self._held.clear()
        self._backend.close()

    def add(self, store: str, attachment: int, texts: Sequence[str], vectors: Vectors) -> None:
        """Keep the passages of a file. See `Backend.add`."""
        with self._changes(store):
            ids = self._backend.add(store, attachment, texts, vectors)
            with self._lock:
                matrix = self._held.get(store)
                if matrix is not None:
                    _append(matrix, ids, attachment, vectors)
                    self._make_room()

    def remove(self, store: str, attachment: int) -> None:
        """Forget the passages of a file, if there are any."""
        with self._changes(store):
            with self._lock:
                matrix = self._held.get(store)
                if matrix is not None:
                    _drop(matrix, attachment)
            self._backend.remove(store, attachment)

    def drop(self, store: str) -> None:
        """Forget a store, if it is there."""
        with self._changes(store):
            with self._lock:
                self._held.pop(store, None)
            self._backend.drop(store)
        with self._lock:
            self._changing.pop(store, None)

    def read(self, passages: Collection[int]) -> Mapping[int, Passage]:
        """Passages by their ids. One that is gone is missing."""
        return self._backend.read(passages)

    def texts(self, store: str, attachment: int) -> list[str]:
        """The passages of a file, in order."""
        return self._backend.texts(store, attachment)

    def nearest(
        self, store: str, vector: Vectors, most: int, among: Collection[int] | None
    ) -> list[Near]:
        """The passages nearest to a vector, exactly. See `Backend.nearest`."""
        view = self._view(store)
        if view is None:
            return self._backend.nearest(store, vector, most, among)
        return _nearest(store, view, vector, most, among)

    def _view(self, store: str) -> Loaded | None:
        """The matrix of a store, loaded if it fits; None: it does not."""
        found = self._use(store)
        if found is not None:
            return found
        with self._changes(store):
            found = self._use(store)  # another thread may have loaded it
            if found is not None:
                return found
            count, dimensions = self._backend.size(store)
            if count * (4 * dimensions + _NUMBERS_BYTES) > self.max_bytes:
                return None
            loaded = self._backend.load(store)
            matrix = _Matrix(loaded, len(loaded.passages))
            with self._lock:
                self._held[store] = matrix
                self._make_room()
            return matrix.view()

    def _use(self, store: str) -> Loaded | None:
        with self._lock:
            matrix = self._held.get(store)
            if matrix is None:
                return None
            self._held.move_to_end(store)
            return matrix.view()

    def _make_room(self) -> None:
        nbytes = sum(matrix.nbytes for matrix in self._held.values())
        while nbytes > self.max_bytes and self._held:
            _, matrix = self._held.popitem(last=False)
            nbytes -= matrix.nbytes

    def _changes(self, store: str) -> threading.Lock:
        with self._lock:
            return self._changing.setdefault(store, threading.Lock())


def _append(matrix: _Matrix, ids: Sequence[int], attachment: int, vectors: Vectors) -> None:
    import numpy as np

    held, begin = matrix.loaded, matrix.count
    end = begin + len(ids)
    if begin == 0 or end > len(held.passages):
        rows = max(end, begin + begin // 4)
        grown = Loaded(
            np.empty(rows, np.int64),
            np.empty(rows, np.int64),
            np.empty((rows, vectors.shape[1]), np.float32),
        )
        grown.passages[:begin] = held.passages[:begin]
        grown.attachments[:begin] = held.attachments[:begin]
        if begin:
            grown.vectors[:begin] = held.vectors[:begin]
        matrix.loaded = held = grown
    held.passages[begin:end] = ids
    held.attachments[begin:end] = attachment
    held.vectors[begin:end] = vectors
    matrix.count = end


def _drop(matrix: _Matrix, attachment: int) -> None:
    view = matrix.view()
    kept = view.attachments != attachment
    if kept.all():
        return
    matrix.loaded = Loaded(view.passages[kept], view.attachments[kept], view.vectors[kept])
    matrix.count = len(matrix.loaded.passages)


def _nearest(
    store: str, view: Loaded, vector: Vectors, most: int, among: Collection[int] | None
) -> list[Near]:
    import numpy as np

    if not len(view.passages):
        return []
    if view.vectors.shape[1] != len(vector):
        raise Conflict(
            f"The vector store {store} has vectors of {view.vectors.shape[1]} dimensions, and its"
            f" embedding model gives {len(vector)} now. Make a new vector store."
        )
    scores = view.vectors @ vector
    rows = np.arange(len(scores))
    if among is not None:
        rows = np.flatnonzero(np.isin(view.attachments, list(among)))
        scores = scores[rows]
    if len(scores) > most:
        best = np.argpartition(-scores, most - 1)[:most]
        rows, scores = rows[best], scores[best]
    order = np.lexsort((view.passages[rows], -scores))
    return [
        Near(int(view.passages[rows[at]]), int(view.attachments[rows[at]]), float(scores[at]))
        for at in order
    ]
