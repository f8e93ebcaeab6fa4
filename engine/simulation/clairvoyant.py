"""The clairvoyant bound: how early a trace could end if every request were known beforehand.

`clairvoyant` gives the shortest makespan of any schedule that the modelled machine allows, whatever
requests it lets wait. It is exact where the trace is small, otherwise a lower bound. The schedule
may bring models in before a request asks for them, but not before the first arrival.

The bound is the largest of these, with T counted from the first arrival. W(m, t) is the seconds
of runs of model m that come at t or later, c its concurrency, b its bytes, B the budget.

1. *One model.* T ≥ t + W(m, t) / c for every t. At first m is absent: T ≥ load + W(m, 0) / c.
2. *One transition at a time.* Every requested model is loaded once and runs after that. Of all
   orders of loads, longest runs first ends earliest (Jackson's rule for 1 || L_max, Management
   Science Research Project 43, UCLA 1955): T ≥ load(1) + … + load(k) + W(k, 0) / c for every k.
3. *Bytes.* At every moment the models on the device have at most B bytes, so for every dual
   feasible function f (Σ x ≤ 1 ⇒ Σ f(x) ≤ 1; Fekete and Schepers, "New classes of fast lower
   bounds for bin packing problems", Mathematical Programming 91, 2001) the integral of Σ f(b / B)
   over the models on the device from t to T is at most T − t. A model is there while it comes in
   and while it runs: T ≥ t + Σ f(b / B) · (return + W(m, t) / c). At t = 0 no model is there, and
   `return` is the load. Later `return` is the quickest way in, and the models that are there at t
   save at most the longest one. If requests that do not count came first, that holds at t = 0 too.
4. *A serial device.* T ≥ t + Σ W(m, t); and in 1 to 3 concurrency saves nothing, c = 1.

In 1 to 3 W / c is never less than the longest single run.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.simulation.traces import Trace, TracedModel, TracedRequest

EXACT_REQUESTS = 16
"""The exact search runs only on traces of at most so many requests …"""
EXACT_NODES = 200_000
"""… and takes at most so many steps, some ten seconds. Otherwise the result is the bound."""
BOUND_TIMES = 400
"""The number of times t that the bound uses, evenly among the arrivals. Any choice is a bound."""

ROUNDING = 1e-9
"""Makespans with a relative difference below this are equal."""


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """The shortest possible makespan, or a lower bound of it."""

    makespan_s: float
    exact: bool
    """False: `makespan_s` is a lower bound."""


def clairvoyant(
    trace: Trace, reached_s: float | None = None, *, serial_device: bool = False
) -> Clairvoyant:
    """The shortest makespan of a trace.

    `reached_s` is the makespan of a known schedule that served every request, if there is one. It
    shortens the search.
    """
    bound_s = lower_bound_s(trace, serial_device=serial_device)
    if reached_s is not None and reached_s <= bound_s * (1 + ROUNDING):
        return Clairvoyant(reached_s, exact=True)
    if serial_device or len(trace.requests) > EXACT_REQUESTS or not _searchable(trace):
        return Clairvoyant(bound_s, exact=False)
    search = _Search(trace, math.inf if reached_s is None else reached_s, bound_s)
    if not search.finish():
        return Clairvoyant(bound_s, exact=False)
    return Clairvoyant(search.best_s, exact=True)


def _searchable(trace: Trace) -> bool:
    """Whether the search below covers every state of this machine.

    It covers models that are on the device as a whole or not at all, host memory for all copies or
    for none, and a machine that is empty at first.
    """
    copies_bytes = sum(model.nbytes for model in trace.models.values())
    whole = all(len(model.blocks) == 1 for model in trace.models.values())
    cold = len(trace.measured) == len(trace.requests)
    return cold and (not trace.parks or (whole and copies_bytes <= trace.host_bytes))


# The bound.


@dataclass(frozen=True, slots=True)
class _Work:
    """The runs of one model that come at some time or later."""

    model: TracedModel
    total_s: float
    busy_s: float
    """The least time for which the model must be on the device to run them."""


def lower_bound_s(trace: Trace, *, serial_device: bool = False) -> float:
    """A makespan that no schedule can be shorter than (see the module's docstring)."""
    arrivals = [request.at_s for request in trace.measured]
    first_s = arrivals[0]
    cold = len(arrivals) == len(trace.requests)
    bound_s = _loads_bound_s(_work_from(trace, first_s, serial_device)) if cold else 0.0
    step = max(1, len(arrivals) // BOUND_TIMES)
    for at_s in arrivals[::step]:
        work = _work_from(trace, at_s, serial_device)
        since_s = at_s - first_s
        bound_s = max(bound_s, since_s + max(each.busy_s for each in work))
        if serial_device:
            bound_s = max(bound_s, since_s + sum(each.total_s for each in work))
        for function, linear in _dual_feasible_functions():
            bound_s = max(
                bound_s,
                since_s + _bytes_bound_s(trace, work, function, linear, cold and since_s == 0),
            )
    return bound_s


def _work_from(trace: Trace, at_s: float, serial_device: bool) -> list[_Work]:
    start = bisect.bisect_left(trace.requests, at_s, key=lambda request: request.at_s)
    runs_s: dict[str, list[float]] = {}
    for request in trace.requests[start:]:
        runs_s.setdefault(request.model, []).append(request.run_s)
    work = []
    for name, each_s in runs_s.items():
        model = trace.models[name]
        at_once = 1 if serial_device else model.max_concurrency
        work.append(_Work(model, sum(each_s), max(sum(each_s) / at_once, max(each_s))))
    return work


def _loads_bound_s(work: list[_Work]) -> float:
    loaded_s = bound_s = 0.0
    for each in sorted(work, key=lambda each: each.busy_s, reverse=True):
        loaded_s += each.model.load_s
        bound_s = max(bound_s, loaded_s + each.busy_s)
    return bound_s


def _bytes_bound_s(
    trace: Trace,
    work: list[_Work],
    function: Callable[[float], float],
    linear: bool,
    from_nothing: bool,
) -> float:
    occupied_s = returns_s = longest_return_s = 0.0
    for each in work:
        share = function(each.model.nbytes / trace.budget_bytes)
        occupied_s += share * each.busy_s
        return_s = each.model.load_s
        if not from_nothing and trace.parks and each.model.wake_s is not None:
            # Some of several blocks may have stayed. That saves their part of the wake, and only a
            # linear function counts parts.
            whole = linear or len(each.model.blocks) == 1
            return_s = each.model.wake_s if whole else 0.0
        returns_s += share * return_s
        longest_return_s = max(longest_return_s, return_s)
    if not from_nothing:
        returns_s = max(0.0, returns_s - longest_return_s)
    return occupied_s + returns_s


def _dual_feasible_functions() -> Iterator[tuple[Callable[[float], float], bool]]:
    """The families u(k) and U(ε) of Fekete and Schepers, and whether each is linear."""
    yield (lambda share: share), True

    def rounded_down(parts: int) -> Callable[[float], float]:
        def function(share: float) -> float:
            scaled = (parts + 1) * share
            return share if scaled == math.floor(scaled) else math.floor(scaled) / parts

        return function

    def rounded_up(small: float) -> Callable[[float], float]:
        def function(share: float) -> float:
            if share > 1 - small:
                return 1.0
            return share if share >= small else 0.0

        return function

    for parts in range(1, 9):
        yield rounded_down(parts), False
    for percent in range(5, 51, 5):
        yield rounded_up(percent / 100), False


# The exact search.


@dataclass(frozen=True, slots=True)
class _State:
    """One moment of a schedule."""

    now_s: float
    begun: int
    """A bit for each request that was started."""
    running: tuple[tuple[float, int], ...]
    """Ends and indices of the current runs, in order of index."""
    tiers: tuple[int, ...]
    """The tier of each model: absent, parked or resident."""
    moving: tuple[float, int, int] | None
    """The transition under way: its end, the model, and the model's next tier."""


_ABSENT, _PARKED, _RESIDENT = range(3)


class _Search:
    """Depth first over all schedules in which every start is at some end or arrival.

    These suffice. Keep the order of all starts and ends of any schedule, and move each start as
    early as that order and the arrivals allow. Each start then coincides with an end or an arrival.
    No run lacks room that had it before, and no run ends later.
    """

    def __init__(self, trace: Trace, reached_s: float, bound_s: float) -> None:
        self.best_s = reached_s
        self._bound_s = bound_s
        self._first_s = trace.requests[0].at_s
        self._requests: list[TracedRequest] = list(trace.requests)
        names = sorted({request.model for request in trace.requests})
        self._models = [trace.models[name] for name in names]
        self._model_of = [names.index(request.model) for request in self._requests]
        self._wakes = [
            model.wake_s if trace.parks and model.wake_s is not None else None
            for model in self._models
        ]
        self._budget_bytes = trace.budget_bytes
        self._nodes = 0
        self._seen: dict[object, list[tuple[float, ...]]] = {}

    def finish(self) -> bool:
        """Search. False: it was given up, and `best_s` is only the best schedule so far."""
        stack = [_State(0.0, 0, (), (_ABSENT,) * len(self._models), None)]
        while stack and self.best_s > self._bound_s * (1 + ROUNDING):
            self._nodes += 1
            if self._nodes > EXACT_NODES:
                return False
            state = stack.pop()
            if state.begun == (1 << len(self._requests)) - 1:
                self.best_s = min(self.best_s, max(end_s for end_s, _ in state.running))
            elif self._least_s(state) * (1 + ROUNDING) < self.best_s and not self._dominated(state):
                # The last on the stack is tried first: starts go before waits.
                stack.extend(self._next(state))
        return True

    def _at_s(self, index: int) -> float:
        return self._requests[index].at_s - self._first_s

    def _left(self, state: _State) -> list[int]:
        return [index for index in range(len(self._requests)) if not state.begun >> index & 1]

    def _least_s(self, state: _State) -> float:
        """A lower bound for the end of every schedule from this state on."""
        least_s = max((end_s for end_s, _ in state.running), default=state.now_s)
        channel_s = state.now_s if state.moving is None else state.moving[0]
        work: dict[int, list[float]] = {}
        for index in self._left(state):
            at_s = max(state.now_s, self._at_s(index))
            least_s = max(least_s, at_s + self._requests[index].run_s)
            work.setdefault(self._model_of[index], []).append(self._requests[index].run_s)
        loads: list[tuple[float, float]] = []
        for number, runs_s in work.items():
            model = self._models[number]
            busy_s = max(max(runs_s), sum(runs_s) / model.max_concurrency)
            going = [end_s for end_s, index in state.running if self._model_of[index] == number]
            if len(going) + 1 > model.max_concurrency:
                least_s = max(least_s, min(going) + max(runs_s))
            if state.moving is not None and state.moving[1] == number:
                if state.moving[2] == _RESIDENT:
                    least_s = max(least_s, state.moving[0] + busy_s)
                else:
                    loads.append((busy_s, self._return_s(number, state.moving[2])))
            elif state.tiers[number] != _RESIDENT:
                loads.append((busy_s, self._return_s(number, state.tiers[number])))
        for busy_s, load_s in sorted(loads, reverse=True):
            channel_s += load_s
            least_s = max(least_s, channel_s + busy_s)
        return least_s

    def _return_s(self, number: int, tier: int) -> float:
        wake_s = self._wakes[number]
        return wake_s if tier == _PARKED and wake_s is not None else self._models[number].load_s

    def _dominated(self, state: _State) -> bool:
        """Whether the search was at the same point before, and at no part of it later."""
        moving = None if state.moving is None else state.moving[1:]
        # A wait for an arrival changes only the number of arrivals, and is not a repetition.
        arrived = sum(self._at_s(i) <= state.now_s for i in range(len(self._requests)))
        running = tuple(index for _, index in state.running)
        key = (state.begun, arrived, running, state.tiers, moving)
        times = (
            state.now_s,
            0.0 if state.moving is None else state.moving[0],
            *(end_s for end_s, _ in state.running),
        )
        seen = self._seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(old, times, strict=True)) for old in seen):
            return True
        seen.append(times)
        return False

    def _next(self, state: _State) -> Iterator[_State]:
        """All next states: waiting first, starts of requests last."""
        if (waited := self._wait(state)) is not None:
            yield waited
        if state.moving is None:
            yield from self._move(state)
        yield from self._start(state)

    def _wait(self, state: _State) -> _State | None:
        """Go on to the next arrival or end."""
        times = [end_s for end_s, _ in state.running]
        times += [at_s for i in self._left(state) if (at_s := self._at_s(i)) > state.now_s]
        if state.moving is not None:
            times.append(state.moving[0])
        if not times:
            return None
        now_s = min(times)
        running = tuple(each for each in state.running if each[0] > now_s)
        tiers, moving = state.tiers, state.moving
        if moving is not None and moving[0] <= now_s:
            tiers = (*tiers[: moving[1]], moving[2], *tiers[moving[1] + 1 :])
            moving = None
        return _State(now_s, state.begun, running, tiers, moving)

    def _free_bytes(self, state: _State) -> int:
        there = {number for number, tier in enumerate(state.tiers) if tier == _RESIDENT}
        if state.moving is not None:
            there.add(state.moving[1])
        return (
            self._budget_bytes
            - sum(self._models[number].nbytes for number in there)
            - sum(self._requests[index].working_bytes for _, index in state.running)
        )

    def _move(self, state: _State) -> Iterator[_State]:
        free_bytes = self._free_bytes(state)
        left = self._left(state)
        wanted = {self._model_of[index] for index in left}
        in_use = {self._model_of[index] for _, index in state.running}
        lacking = any(
            (0 if state.tiers[number] == _RESIDENT else self._models[number].nbytes)
            + max(self._requests[i].working_bytes for i in left if self._model_of[i] == number)
            > free_bytes
            for number in wanted
        )
        for number, tier in enumerate(state.tiers):
            model = self._models[number]
            if tier != _RESIDENT:
                if number in wanted and model.nbytes <= free_bytes:
                    end_s = state.now_s + self._return_s(number, tier)
                    yield _moved(state, (end_s, number, _RESIDENT))
            elif lacking and number not in in_use:
                parks = self._wakes[number] is not None
                if parks:
                    yield _moved(state, (state.now_s + model.park_s, number, _PARKED))
                if not parks or model.unload_s < model.park_s:
                    yield _moved(state, (state.now_s + model.unload_s, number, _ABSENT))

    def _start(self, state: _State) -> Iterator[_State]:
        free_bytes = self._free_bytes(state)
        alike: set[tuple[int, float, int]] = set()
        for index in self._left(state):
            request, number = self._requests[index], self._model_of[index]
            leases = sum(self._model_of[each] == number for _, each in state.running)
            same = (number, request.run_s, request.working_bytes)
            if (
                self._at_s(index) > state.now_s
                or same in alike
                or state.tiers[number] != _RESIDENT
                or (state.moving is not None and state.moving[1] == number)
                or leases >= self._models[number].max_concurrency
                or request.working_bytes > free_bytes
            ):
                continue
            alike.add(same)
            running = sorted((*state.running, (state.now_s + request.run_s, index)), key=_index)
            yield _State(
                state.now_s,
                state.begun | 1 << index,
                tuple(running),
                state.tiers,
                state.moving,
            )


def _index(run: tuple[float, int]) -> int:
    return run[1]


def _moved(state: _State, moving: tuple[float, int, int]) -> _State:
    return _State(state.now_s, state.begun, state.running, state.tiers, moving)
