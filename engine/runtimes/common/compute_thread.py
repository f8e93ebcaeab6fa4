"""A thread for native computations."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")

_PAUSE_SOFT = 1
"""`omp_pause_soft` of OpenMP 5.0, which keeps the settings."""


class ComputeThread(ThreadPoolExecutor):
    """One thread whose OpenMP pool lasts no longer than each call.

    A pool belongs to the thread that computes, and lives as long as that thread. In GNU's OpenMP
    the threads of a pool spin at barriers. They hardly spin once all pools of the process, idle
    ones included, have more threads than there are cores: each barrier then waits for the kernel.
    So one model that was loaded or used some time ago would slow down all others.
    """

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn` on the thread."""
        return super().submit(_with_passing_pool, fn, *args, **kwargs)


def _with_passing_pool(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    try:
        return fn(*args, **kwargs)
    finally:
        end_openmp_pools()


def end_openmp_pools() -> None:
    """End the threads that GNU's OpenMP keeps for the calling thread."""
    if "torch" in sys.modules:
        for pause in _pauses():
            pause(_PAUSE_SOFT)


@functools.cache
def _pauses() -> list[Callable[[int], int]]:
    """`omp_pause_resource_all` of each GNU OpenMP that torch and others have loaded so far.

    Those of LLVM and Intel are left out: they pause the whole process.
    """
    return [
        library.dynlib.omp_pause_resource_all
        for library in ThreadpoolController().lib_controllers
        if library.prefix == "libgomp" and hasattr(library.dynlib, "omp_pause_resource_all")
    ]
