"""Threads of a model's library last no longer than its computations."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threadpoolctl import threadpool_limits

from engine.runtimes.common.compute_thread import ComputeThread

pytestmark = pytest.mark.slow

WAIT_S = 10.0


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_for_threads(most: int) -> None:
    """Return once the process has no more threads than that; a thread that ended stays a moment."""
    deadline_s = time.monotonic() + WAIT_S
    while threads() > most:
        assert time.monotonic() < deadline_s


def compute() -> int:
    """Something large enough to be shared among two threads; how many the process has then."""
    torch.get_num_threads()  # else torch sets the thread's number when it first computes
    threadpool_limits(2, user_api="openmp")
    numbers = torch.ones(1_000_000)
    assert float((numbers + numbers).sum()) == 2e6
    return threads()


def test_a_pool_ends_with_the_call() -> None:
    before = threads()
    with ComputeThread("small") as thread:
        for _ in range(3):
            assert thread.submit(compute).result() >= before + 2
            wait_for_threads(before + 1)
    wait_for_threads(before)  # a joined thread is counted for a moment longer


def test_what_a_plain_thread_would_leave_behind() -> None:
    """Else the test above could not fail."""
    before = threads()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compute).result()
        assert threads() >= before + 2
    wait_for_threads(before)


def test_a_failure_is_told_and_ends_the_pool_too() -> None:
    before = threads()

    def fail() -> None:
        compute()
        raise ZeroDivisionError

    with ComputeThread("small") as thread:
        with pytest.raises(ZeroDivisionError):
            thread.submit(fail).result()
        wait_for_threads(before + 1)
