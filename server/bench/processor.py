"""The CPU time that this process and other programs used during a round."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import psutil

from server.bench.memory import tree


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """CPU seconds used up to a moment."""

    machine_s: float
    """By all programs of the machine."""
    own_s: float
    """By this process and its descendants, which include the started targets."""

    @classmethod
    def now(cls) -> ProcessorTime:
        """The CPU seconds used up to now."""
        all_s = psutil.cpu_times()
        machine_s = all_s.user + all_s.nice + all_s.system + all_s.irq + all_s.softirq
        own_s = 0.0
        for process in tree(os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                ended_s = times.children_user + times.children_system
                own_s += times.user + times.system + ended_s
        return cls(machine_s, own_s)

    def others_since(self, before: ProcessorTime) -> float:
        """CPU seconds that other programs used since `before`, at least 0."""
        machine_s = self.machine_s - before.machine_s
        return max(0.0, machine_s - (self.own_s - before.own_s))
