"""The files that this process maps: which file an address comes from, and reading it from there.

Reading a file is faster than touching its mapped pages one by one.

Importing this module imports torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from engine.memory.host_memory import CHUNK_BYTES


class MappedFiles:
    """Which memory of this process maps which file, at the time of construction."""

    LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ ([1-9]\d*)\s+(/.*)$")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._maps: list[tuple[int, int, str]] = []
        """(end, offset in the file, path), by start."""
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    if match := self.LINE.match(line):
                        start, end, offset = (int(text, 16) for text in match.group(1, 2, 3))
                        self._starts.append(start)
                        self._maps.append((end, offset, match.group(5)))
        except OSError:
            pass  # this system has no such file: no mapping is known

    def find(self, address: int, nbytes: int) -> tuple[str, int] | None:
        """The file that holds these bytes, and their offset in it; None if memory differs from it.

        The answer is None as well where no file is mapped, or where it was deleted since.
        """
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        end, offset, path = self._maps[index]
        if address + nbytes > end or _is_device(path) or path.endswith(" (deleted)"):
            return None
        if _written(address, nbytes):  # by the library, and only in memory
            return None
        return path, offset + address - self._starts[index]


def _is_device(path: str) -> bool:
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")


def read_file(path: str, offset: int, targets: Sequence[torch.Tensor]) -> None:
    """Read a piece of a file into the first target, and copy it from there into the others.

    The targets are tensors of bytes in host memory, all of the length to read.

    Raises:
        OSError: the file cannot be read, or is too short.

    """
    view = memoryview(targets[0].numpy())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + CHUNK_BYTES]], offset + done)
            if got == 0:
                raise OSError(f"{path} ends before its tensors do")
            for other in targets[1:]:
                ctypes.memmove(other.data_ptr() + done, targets[0].data_ptr() + done, got)
            done += got
    finally:
        os.close(descriptor)


def _written(address: int, nbytes: int) -> bool:
    """Whether pages of a mapped file were written to, and are now private memory.

    Read from /proc/self/pagemap. Bits 63 and 62 say that a page is in memory or swapped out. Bit 61
    says that it is the file's (https://docs.kernel.org/admin-guide/mm/pagemap.html).
    """
    first = address // mmap.PAGESIZE
    count = -(-(address + nbytes) // mmap.PAGESIZE) - first
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return True  # unknown, so assume the worst
    try:
        entries = np.frombuffer(os.pread(descriptor, 8 * count, 8 * first), np.uint64) >> 61
    finally:
        os.close(descriptor)
    return len(entries) < count or bool(np.isin(entries, (0b010, 0b100, 0b110)).any())
