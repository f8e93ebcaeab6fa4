"""The watchdog: the native calls under way, and whether each of them makes progress.

A call that never returns is visible nowhere else. The event loop answers. The thread that steps the
models would answer once the call ends. Only the call's own client waits for ever. So all code that
calls a library for a request announces it (`Watchdog.watch`) and counts its progress.

Missing progress alone is not a hang. One layer of a large model can take half a minute on a CPU; a
compiler takes minutes, and so does a file on a slow disk. Processor time makes the difference:
work uses it, and a call that waits for ever does not. A call that waits for a dead GPU by spinning
does use it; `Device.check` finds that case.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import sysconf
from pathlib import Path
from typing import Protocol

import psutil

from engine.process.gate import GATE, Gate

COMPUTES_SHARE = 0.05
"""Share of one core. A call of which the thread uses less between two checks is idle."""

MAX_INTERVAL_S = 3.0
"""The most that counts of the time between two checks. More passes when the whole process stood
still, and its calls with it: a suspended machine, a frozen container."""

_CPU_TICKS_PER_S = sysconf("SC_CLK_TCK")


class Work(Protocol):
    """The work of a watched call."""

    progress: int
    """Changes with every progress of the work. Read by other threads."""


class Usage(Protocol):
    """Processor time used so far, in seconds."""

    def thread_s(self, native_id: int) -> float:
        """By one thread of this process."""

    def waits_for_disk(self, native_id: int) -> bool:
        """Whether that thread waits for a disk at this moment."""

    def process_s(self) -> float:
        """By this process."""

    def children_s(self) -> float:
        """By its child processes that still run: compilers."""


class SystemUsage:
    """Processor time as Linux reports it."""

    def thread_s(self, native_id: int) -> float:
        """User and system time; 0 for a thread that has ended."""
        fields = self._fields(native_id)
        return (int(fields[11]) + int(fields[12])) / _CPU_TICKS_PER_S if fields else 0.0

    def waits_for_disk(self, native_id: int) -> bool:
        """State D: local disks, and network ones."""
        return self._fields(native_id)[:1] == ["D"]

    def _fields(self, native_id: int) -> list[str]:
        """Fields of proc(5)'s `stat` from the third (the state) on; the name may have blanks."""
        try:
            text = Path(f"/proc/self/task/{native_id}/stat").read_text()
        except OSError:
            return []
        return text.rpartition(")")[2].split()

    def process_s(self) -> float:
        """Of all threads together."""
        return time.process_time()

    def children_s(self) -> float:
        """Of all descendants."""
        used_s = 0.0
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:  # the child has just ended
                continue
            used_s += times.user + times.system
        return used_s


@dataclass(slots=True, eq=False)
class _Call:
    what: str
    work: Work | None
    thread: int
    native_id: int | None
    """The thread of which the processor time counts; None: the whole process."""
    computes: bool
    seen: int
    silent_s: float = 0.0
    """Since its last progress."""
    idle_s: float = 0.0
    """Since its last progress or processor time."""
    used_s: float | None = None
    children_s: float | None = None

    def reset(self) -> None:
        self.silent_s = self.idle_s = 0.0
        self.used_s = self.children_s = None


class Watchdog:
    """Every native call under way. Call `watch` from any thread, `check` from one."""

    def __init__(
        self,
        gate: Gate = GATE,
        clock: Callable[[], float] = time.monotonic,
        usage: Usage | None = None,
    ) -> None:
        """Calls that wait at `gate` do not count as under way."""
        self._gate = gate
        self._clock = clock
        self._usage = usage or SystemUsage()
        self._calls: set[_Call] = set()
        self._checked_at: float | None = None
        self._hold: int | None = None
        self._held_s = 0.0

    @contextmanager
    def watch(
        self, what: str, work: Work | None = None, *, helpers: bool = False, computes: bool = True
    ) -> Iterator[None]:
        """Watch a call that the calling thread makes. `what` names it in a fault.

        With `helpers` the library computes on threads of its own while this one waits. Without
        `computes` processor time does not count: such a call hangs as soon as it takes long.
        """
        native_id = None if helpers else threading.get_native_id()
        seen = 0 if work is None else work.progress
        call = _Call(what, work, threading.get_ident(), native_id, computes, seen)
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def check(self, hang_s: float, stall_s: float) -> str | None:
        """The reason why a call never ends, in words, or None. Call it about once a second.

        A call hangs if for `hang_s` it made no progress and did not compute, or if for `stall_s` it
        made no progress at all. Exclusive work hangs if it held the gate for `stall_s`.
        """
        now = self._clock()
        elapsed_s = 0.0 if self._checked_at is None else min(now - self._checked_at, MAX_INTERVAL_S)
        self._checked_at = now
        for call in tuple(self._calls):
            progress = 0 if call.work is None else call.work.progress
            if progress != call.seen or self._gate.waits(call.thread):
                call.seen = progress
                call.reset()
                continue
            call.silent_s += elapsed_s
            call.idle_s += elapsed_s
            if call.computes and self._computed(call, elapsed_s):
                call.idle_s = 0.0
            if call.idle_s > hang_s or call.silent_s > stall_s:
                return f"{call.what} hangs: it has got no further for {call.silent_s:.0f} s"
        hold = self._gate.hold
        self._held_s = self._held_s + elapsed_s if hold == self._hold and hold is not None else 0.0
        self._hold = hold
        if self._held_s > stall_s:
            return f"a load hangs: it has kept every model waiting for {self._held_s:.0f} s"
        return None

    def _computed(self, call: _Call, elapsed_s: float) -> bool:
        """Whether it computed since the last check, or waits for a disk or a compiler."""
        usage, least_s = self._usage, COMPUTES_SHARE * elapsed_s
        used_s = usage.process_s() if call.native_id is None else usage.thread_s(call.native_id)
        before_s, call.used_s = call.used_s, used_s
        if before_s is None or used_s - before_s > least_s:
            return True
        if call.native_id is not None and usage.waits_for_disk(call.native_id):
            return True
        children_s = usage.children_s()
        before_s, call.children_s = call.children_s, children_s
        return before_s is not None and children_s - before_s > least_s


WATCHDOG = Watchdog()
"""There is one process, so there is one watchdog."""
