"""The C library's memory allocator, from which the tensors of a CPU come."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
from functools import cache

M_ARENA_MAX = -8
"""glibc's number for the setting, from its malloc.h."""
HEAPS = 1
"""Heaps that threads share, instead of glibc's eight a core. Every model has its own threads, and
memory that one thread leaves in its own heap is no use to the next. After a dozen loads and runs of
a tiny Whisper that was 52 MB, with two heaps 24 MB, and with one heap nothing."""


def share_one_heap() -> None:
    """Make all threads use the first heap. Call it before the process has a second thread.

    A thread keeps the heap that it has, and glibc hands that on to later threads. `malloc_trim`
    cannot give back the free memory at the end of any heap but the first: up to 64 MiB of parked
    weights would stay ("M_TRIM_THRESHOLD" of mallopt(3), which grows by itself).
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_ARENA_MAX, HEAPS)


def trim() -> None:
    """Give free pages back to the system. Otherwise glibc keeps them."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc. Others have other settings."""
    name = ctypes.util.find_library("c") if platform.libc_ver()[0] == "glibc" else None
    return ctypes.CDLL(name) if name else None
