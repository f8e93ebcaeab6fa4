"""The baseline on the modelled machine: FIFO admission, LRU eviction, as most servers do.

Requests are admitted strictly in order of arrival, whatever their priority. The first of the queue
holds up the rest until it runs. If its model is not there, idle models leave, the least recently
used first, until it fits. Then it is brought in. Admitted requests run side by side, up to the
concurrency of their models.

All other rules are those of the engine. Each transition takes the same seconds, one at a time, with
runs going on beside it. Host memory is the same, so an evicted model comes back from its host copy
where there was room for one. The timeouts are the same.
"""

from __future__ import annotations

import math
from collections import deque

from engine.simulation.machine import Machine, Tier
from engine.simulation.outcome import Outcome
from engine.simulation.traces import Trace


def fifo_lru(trace: Trace, *, serial_device: bool = False) -> Outcome:
    """Serve a trace in order of arrival, evicting least recently used idle models."""
    machine = Machine(trace, serial_device=serial_device)
    server = _FifoLru(trace, machine)
    machine.play(server.arrive)
    return machine.outcome()


class _FifoLru:
    def __init__(self, trace: Trace, machine: Machine) -> None:
        self._trace = trace
        self._machine = machine
        self._queue: deque[int] = deque()

    def arrive(self, index: int) -> None:
        request = self._trace.requests[index]
        self._queue.append(index)
        if request.timeout_s < math.inf:
            self._machine.at(request.at_s + request.timeout_s, lambda: self._give_up(index))
        self._serve()

    def _give_up(self, index: int) -> None:
        if index in self._queue:
            self._queue.remove(index)
            self._machine.refuse(index)
            self._serve()

    def _serve(self) -> None:
        """Admit requests while possible, then start what the first of the queue needs."""
        machine = self._machine
        while self._queue:
            index = self._queue[0]
            request = self._trace.requests[index]
            name, model = request.model, self._trace.models[request.model]
            resident = machine.tiers[name] is Tier.RESIDENT and machine.moving != name
            if resident and machine.runs[name] >= model.max_concurrency:
                return
            missing_bytes = model.nbytes - machine.device_bytes[name]
            if missing_bytes + request.working_bytes > machine.free_bytes:
                self._evict_for(name)
                return
            if not resident:
                self._bring_in(name)
                return
            self._queue.popleft()
            machine.start(index, self._serve)

    def _bring_in(self, name: str) -> None:
        machine = self._machine
        if machine.moving is not None:
            return
        if machine.tiers[name] is Tier.PARKED:
            machine.wake(name, lambda _: self._serve())
        else:
            machine.load(name, lambda _: self._serve())

    def _evict_for(self, name: str) -> None:
        machine = self._machine
        idle = [
            other
            for other, tier in machine.tiers.items()
            if other != name and tier is Tier.RESIDENT and not machine.runs[other]
        ]
        if machine.moving is not None or not idle:
            return
        victim = min(idle, key=lambda other: machine.last_used_s[other])
        if victim in machine.copied:
            machine.park(victim, self._trace.models[victim].blocks, self._serve)
        else:
            machine.unload(victim, self._serve)
