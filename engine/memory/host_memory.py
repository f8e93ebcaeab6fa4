"""Host memory for master copies: large slabs within one budget."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.units import format_size

if TYPE_CHECKING:
    import torch

SLAB_BYTES = 256 * 1024**2
"""Size of a slab, unless one tensor is larger. torch rounds pinned allocations up to powers of two,
so a slab is one."""

PAGE_BYTES = 4096

HUGE_PAGE_BYTES = 2 * 1024**2
"""What the kernel gives at once if it is asked to."""

CHUNK_BYTES = 8 * 1024**2
"""Read or copied at once. Between two chunks other threads get their turn."""


def host_slab(nbytes: int) -> torch.Tensor:
    """Host memory as a tensor of bytes, not page-locked; in huge pages if it is large.

    The kernel clears each page at its first use, and takes each page back at the end. With small
    pages that takes several times as long as filling 256 MB. A slab goes back to the system as soon
    as no tensor uses it.
    """
    import torch

    if nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def copy_bytes(
    target: torch.Tensor, source: torch.Tensor, pause: Callable[[], None] = lambda: None
) -> None:
    """Copy within host memory, on this thread alone. `pause` is called after each chunk.

    torch would copy with all its threads, and take the cores from whatever runs beside.
    """
    for start in range(0, source.numel(), CHUNK_BYTES):
        nbytes = min(CHUNK_BYTES, source.numel() - start)
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, nbytes)
        pause()


class HostMemoryFull(Exception):
    """The budget has no room for a slab of that size. Nothing was taken."""


@dataclass(slots=True, eq=False)
class Spare:
    """Slabs with contents that can be made anew. They go as soon as others want the room."""

    owner: str
    nbytes: int
    slabs: list[torch.Tensor]
    """Empty once they are gone."""


class HostMemory:
    """Gives out slabs of host memory, page-locked where a GPU reads them. Threads may share it."""

    def __init__(self, budget_bytes: int, *, pinned: bool) -> None:
        self.budget_bytes = budget_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._idle: list[torch.Tensor] = []
        """Page-locked slabs that are free. Locking pages takes longer than filling them."""
        self._spares: list[Spare] = []
        """Oldest first."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all slabs in use, and of spares."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """What the budget still holds, if all spares go."""
        with self._lock:
            return self._free_bytes()

    @property
    def unused_bytes(self) -> int:
        """What the budget still holds beside the spares."""
        return self.budget_bytes - self._used_bytes

    def spare_bytes(self) -> dict[str, int]:
        """Bytes of spares by their owners."""
        found: dict[str, int] = {}
        with self._lock:
            for each in self._spares:
                found[each.owner] = found.get(each.owner, 0) + each.nbytes
        return found

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A slab of at least `nbytes` as a tensor of bytes, not initialised.

        Raises:
            HostMemoryFull: the budget does not hold it.

        """
        nbytes = self.rounded(nbytes)
        with self._lock:
            self._take(nbytes)
            for index, slab in enumerate(self._idle):
                if slab.numel() == nbytes:
                    return self._idle.pop(index)
            self._fit_idle()
        import torch

        try:
            if not self._pinned:
                return host_slab(nbytes)
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except BaseException:
            with self._lock:
                self._used_bytes -= nbytes
            raise

    def free(self, slab: torch.Tensor) -> None:
        """Take a slab back. The caller must not hold a view of it any more."""
        with self._lock:
            self._give_back((slab,))

    def make_spare(self, owner: str, slabs: Iterable[torch.Tensor]) -> Spare:
        """Hand in slabs of `allocate` that may go when others want the room.

        The caller must hold no view of them any more.
        """
        slabs = list(slabs)
        spare = Spare(owner, sum(slab.numel() for slab in slabs), slabs)
        with self._lock:
            self._spares.append(spare)
        return spare

    def take_spare(self, spare: Spare) -> list[torch.Tensor]:
        """The slabs of a spare, which are the caller's again; none if they are gone."""
        with self._lock:
            if spare in self._spares:
                self._spares.remove(spare)
            slabs, spare.slabs = spare.slabs, []
            return slabs

    def reserve(self, nbytes: int) -> None:
        """Count bytes that a library allocates itself. `unreserve` takes them back.

        Raises:
            HostMemoryFull: the budget does not hold them.

        """
        with self._lock:
            self._take(nbytes)
            self._fit_idle()

    def unreserve(self, nbytes: int) -> None:
        """Count no longer what `reserve` counted."""
        with self._lock:
            self._used_bytes -= nbytes

    def close(self) -> None:
        """Give the idle slabs and the spares back to the system."""
        with self._lock:
            while self._spares:
                self._drop_spare()
            self._drop_idle()

    def _free_bytes(self) -> int:
        return self.unused_bytes + sum(each.nbytes for each in self._spares)

    def _take(self, nbytes: int) -> None:
        """Count bytes as used. Spares go for them, the oldest first."""
        if nbytes > self._free_bytes():
            free = format_size(max(0, self._free_bytes()))
            raise HostMemoryFull(f"{format_size(nbytes)} wanted, {free} of host memory free")
        while nbytes > self.unused_bytes:
            self._drop_spare()
        self._used_bytes += nbytes

    def _drop_spare(self) -> None:
        spare = self._spares.pop(0)
        slabs, spare.slabs = spare.slabs, []
        self._give_back(slabs)

    def _give_back(self, slabs: Iterable[torch.Tensor]) -> None:
        for slab in slabs:
            self._used_bytes -= slab.numel()
            if self._pinned:
                self._idle.append(slab)

    def _fit_idle(self) -> None:
        """Drop idle slabs of other sizes if need be: they count as free, so they must be free."""
        idle_bytes = sum(slab.numel() for slab in self._idle)
        if self._used_bytes + idle_bytes > self.budget_bytes:
            self._drop_idle()

    def _drop_idle(self) -> None:
        if self._idle:
            import torch

            self._idle.clear()
            # Otherwise torch keeps page-locked memory. Before torch 2.12 only CUDA's call is there.
            if hasattr(torch.accelerator.memory, "empty_host_cache"):
                torch.accelerator.memory.empty_host_cache()
            else:
                torch._C._host_emptyCache()

    def rounded(self, nbytes: int) -> int:
        """The bytes of the slab that `allocate` gives for so many."""
        if self._pinned:
            return max(PAGE_BYTES, 1 << (nbytes - 1).bit_length())
        return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
