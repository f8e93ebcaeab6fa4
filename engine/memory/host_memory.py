"""Host memory for master copies: large slabs within one budget."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable
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


class HostMemory:
    """Gives out slabs of host memory, page-locked where a GPU reads them. Threads may share it."""

    def __init__(self, budget_bytes: int, *, pinned: bool) -> None:
        self.budget_bytes = budget_bytes
        self._pinned = pinned
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._idle: list[torch.Tensor] = []
        """Page-locked slabs that are free. Locking pages takes longer than filling them."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all slabs in use."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """What the budget still holds."""
        return self.budget_bytes - self._used_bytes

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A slab of at least `nbytes` as a tensor of bytes, not initialised.

        Raises:
            HostMemoryFull: the budget does not hold it.

        """
        nbytes = self._rounded(nbytes)
        with self._lock:
            if nbytes > self.free_bytes:
                free = format_size(max(0, self.free_bytes))
                raise HostMemoryFull(f"{format_size(nbytes)} wanted, {free} of host memory free")
            self._used_bytes += nbytes
            for index, slab in enumerate(self._idle):
                if slab.numel() == nbytes:
                    return self._idle.pop(index)
            # Idle slabs of other sizes count as free, so their memory must really be free.
            idle_bytes = sum(slab.numel() for slab in self._idle)
            if self._used_bytes + idle_bytes > self.budget_bytes:
                self._drop_idle()
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
            self._used_bytes -= slab.numel()
            if self._pinned:
                self._idle.append(slab)

    def reserve(self, nbytes: int) -> None:
        """Count bytes that a library allocates itself. `unreserve` takes them back.

        Raises:
            HostMemoryFull: the budget does not hold them.

        """
        with self._lock:
            if nbytes > self.free_bytes:
                free = format_size(max(0, self.free_bytes))
                raise HostMemoryFull(f"{format_size(nbytes)} wanted, {free} of host memory free")
            self._used_bytes += nbytes
            idle_bytes = sum(slab.numel() for slab in self._idle)
            if self._used_bytes + idle_bytes > self.budget_bytes:
                self._drop_idle()

    def unreserve(self, nbytes: int) -> None:
        """Count no longer what `reserve` counted."""
        with self._lock:
            self._used_bytes -= nbytes

    def close(self) -> None:
        """Give the idle slabs back to the system."""
        with self._lock:
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

    def _rounded(self, nbytes: int) -> int:
        if self._pinned:
            return max(PAGE_BYTES, 1 << (nbytes - 1).bit_length())
        return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
