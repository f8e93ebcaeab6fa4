"""The C library's heap, in processes of their own: its setting is for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have other settings"
)

BLOCKS = 4  # less than the end of a heap that glibc cuts off by itself, 48 MiB here
MIB = 2**20
PROGRAM = f"""
import ctypes, sys, threading, psutil
from engine.memory import malloc

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def block():
    address = libc.malloc({11 * MIB})
    ctypes.memset(address, 1, {11 * MIB})
    return address

def take_and_free():
    blocks = [block() for _ in range({BLOCKS})]
    for each in reversed(blocks):
        libc.free(each)

def resident():
    malloc.trim()
    return psutil.Process().memory_info().rss

if sys.argv[1] == "one":
    malloc.share_one_heap()
libc.free(libc.malloc({24 * MIB}))  # from now on glibc takes smaller blocks from a heap
before = resident()
thread = threading.Thread(target=take_and_free)
thread.start()
thread.join()
print(resident() - before)
"""


def kept_bytes(heaps: str) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, heaps],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"},
    )
    return int(answer.stdout)


def test_what_another_thread_freed_goes_back_to_the_system() -> None:
    assert kept_bytes("one") < MIB
    assert kept_bytes("many") > 11 * MIB  # else nothing was shown
