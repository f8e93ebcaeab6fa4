"""The one thread that steps every vLLM engine core of this process.

vLLM keeps its forward context in a module global. Two cores that step on two threads would read
each other's context, so one thread steps all of them in turn.

Importing this module imports torch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

import torch
from threadpoolctl import threadpool_limits

from engine.process.faults import FAULTS
from engine.process.gate import GATE
from engine.process.watchdog import WATCHDOG
from engine.runtimes.common.compute_thread import end_openmp_pools

ALIVE_S = 0.2
"""Interval at which a caller that waits for the core thread checks that the thread is alive."""


class CoreThreadEnded(RuntimeError):
    """The thread that steps the cores has ended, so no core can be used any more."""


class Stepped(Protocol):
    """What the thread needs of a core's client. All methods run on the thread."""

    def has_work(self) -> bool:
        """Whether a step would do something."""

    def step(self) -> None:
        """One scheduling and decoding step; the caller holds the gate."""

    def lose(self, error: BaseException) -> None:
        """The thread has ended: answer all requests and calls with an error. Must not raise."""


class CoreThread:
    """The one thread that steps every engine core.

    An exception on it is a bug, and nobody knows in which state it left the cores. The thread then
    ends, all clients are lost, and the process is replaced.
    """

    def __init__(self, omp_threads: int | None = None) -> None:
        """Steps compute with `omp_threads` OpenMP threads. None leaves that to the libraries."""
        self._omp_threads = omp_threads
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: list[Stepped] = []
        """Those that are stepped. Only the thread changes it."""
        self._attached: set[Stepped] = set()
        """Those that are told if the thread dies, from the call of `attach` on."""
        self._ending = threading.Lock()
        self._ended = False
        """No further job is taken."""
        self._thread = threading.Thread(target=self._live, name="vllm-cores", daemon=True)
        self._thread.start()

    @property
    def waits_at_gate(self) -> bool:
        """Whether the thread waits for exclusive work to end."""
        return GATE.waits(self._thread.ident or 0)

    def post(self, job: Callable[[], None]) -> bool:
        """Run `job` on the thread between two steps, in the order posted.

        Returns False if the thread has ended: the job does not run. An exception of the job ends
        the thread.
        """
        with self._ending:
            if not self._ended:
                self._inbox.put(job)
            return not self._ended

    def attach(self, client: Stepped) -> None:
        """Start stepping a core.

        Raises:
            CoreThreadEnded: there is no thread to step it.

        """
        self._attached.add(client)
        if not self.post(lambda: self._clients.append(client)):
            self._attached.discard(client)
            raise CoreThreadEnded("the thread that steps vLLM's models has ended")

    def detach(self, client: Stepped) -> None:
        """Stop stepping a core. Returns once no step of it is under way.

        This may be called after the thread has ended: an `AsyncLLM` that was not shut down calls it
        when it is collected.
        """
        self._attached.discard(client)
        done: Future[None] = Future()

        def job() -> None:
            if client in self._clients:
                self._clients.remove(client)
            done.set_result(None)

        self.post(job)
        with GATE.yielded():  # a constructor that fails detaches in the middle of exclusive work
            while self._thread.is_alive() and not done.done():
                wait([done], timeout=ALIVE_S)

    def stop(self) -> None:
        """End the thread after the jobs posted so far."""
        with self._ending:
            self._ended = True
            self._inbox.put(None)
        self._thread.join()

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            with self._ending:
                self._ended = True
            FAULTS.report("the thread that steps vLLM's models", error)
            for client in tuple(self._attached):
                client.lose(error)

    def _run(self) -> None:
        if self._omp_threads is not None:
            torch.get_num_threads()  # or torch would set the number when it first computes here
            # Each library in the process has its own OpenMP. The limit holds for this thread.
            threadpool_limits(self._omp_threads, user_api="openmp")
        if torch.cuda.is_available():
            # Otherwise a step waits for all kernels that runs of other models have queued.
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
        while True:
            working = [client for client in self._clients if client.has_work()]
            if not working:
                end_openmp_pools()  # or runs on other threads would wait at its barriers
            if not self._drain(block=not working):
                return
            if not working:
                continue
            # All take one turn at the gate, so that no stream waits for two exclusive holders.
            with WATCHDOG.watch("a step of vLLM"), GATE.step():
                for client in working:
                    if client in self._clients:  # a job just run may have detached it
                        client.step()
            # The thread must not keep a dead core alive while it waits.
            working.clear()
            client = None  # type: ignore[assignment]

    def _drain(self, *, block: bool) -> bool:
        while True:
            try:
                job = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            with WATCHDOG.watch("a call of vLLM"):
                job()
            block = False
