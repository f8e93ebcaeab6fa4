"""Runs the rounds of a measurement and keeps their figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.bench.errors import BadSetUp, InvalidRun, NotStarted
from server.bench.figures import Comparison, Figure, Spread, round_order
from server.bench.memory import memory_of
from server.bench.processor import ProcessorTime
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.targets import Server, Target
from server.bench.work import Round

EXCERPT = 120
"""Characters of a sample's answer that the error for a difference shows."""
OTHERS_CORES = 0.1
"""A warning is given if other programs keep more cores than this busy."""
WARM_UP = 0
"""The seed of the round that does not count."""


@dataclass(slots=True)
class CaseResult:
    """The figures of one row of a scenario. The outer index is the target's."""

    case: Case
    figures: list[list[dict[str, float]]]
    """Of each round. A round without a good answer has none and ends the case."""
    errors: list[Counter[str]]
    """What was wrong with answers, and how often. The warm-up counts here."""
    others: list[float] = field(default_factory=list)
    """Of each round: how many cores other programs kept busy."""

    def values(self, target: int, figure: Figure) -> list[float]:
        """A figure of one target, round by round."""
        return [each[figure.name] for each in self.figures[target]]

    def spread(self, target: int, figure: Figure) -> Spread | None:
        """The spread of a figure over the rounds; None if there were none."""
        values = self.values(target, figure)
        return Spread.of(values) if values else None

    def comparison(self, figure: Figure) -> Comparison | None:
        """Both targets of a figure; None unless there are two and each pair is complete."""
        if len(self.figures) != 2:
            return None
        ours, peer = self.values(0, figure), self.values(1, figure)
        if not ours or len(ours) != len(peer):
            return None
        return Comparison.of(figure, ours, peer)


@dataclass(slots=True)
class Result:
    """A whole measurement."""

    scenario: Scenario
    targets: Sequence[Target]
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """The number of errors, of all targets and cases."""
        return sum(each.total() for case in self.cases for each in case.errors)

    def warnings(self) -> list[str]:
        """What a reader must know besides the figures."""
        found = []
        started = all(target.command for target in self.targets)
        for case in self.cases:
            if started and case.others and (cores := Spread.of(case.others).median) > OTHERS_CORES:
                found.append(f"{case.case.name}: other programs kept {cores:.1f} cores busy")
            for target, counted in zip(self.targets, case.errors, strict=True):
                for reason, number in counted.most_common():
                    found.append(f"{case.case.name}, {target.name}: {number} × {reason}")
            noisy = [
                comparison.figure.name
                for figure in self.scenario.figures
                if (comparison := case.comparison(figure)) is not None
                and comparison.noisy
                and figure.higher_is_better is not None
            ]
            if noisy:
                found.append(
                    f"{case.case.name}: the ratio's spread is wider than its distance from 1, so no"
                    f" difference is shown in {', '.join(noisy)}"
                )
        return found


def round_count(scenario: Scenario, targets: int, repeats: int) -> int:
    """The number of rounds to come. Warm-ups and samples count."""
    samples = targets if targets > 1 and scenario.samples() and not scenario.starts else 0
    return samples + len(scenario.cases()) * targets * (repeats + 1)


async def run(
    scenario: Scenario, targets: Sequence[Target], repeats: int, on_round: Callable[[str], None]
) -> Result:
    """Measure one target, or two in pairs of rounds: A B, B A and so on.

    `on_round` gets a line of text before each step. All targets run during the whole measurement,
    except in a scenario about starting. There each round has its own process, alone.

    Raises:
        NotStarted: a target did not start, or died.
        InvalidRun: the two gave different answers.
        BadSetUp: the scenario must start its target, and this one runs already.

    """
    result = Result(scenario, targets)
    if scenario.starts and not all(isinstance(target, Server) for target in targets):
        raise BadSetUp(f"{scenario.name} is about starting a server, and this one runs already")
    try:
        if not scenario.starts:
            for target in targets:
                on_round(f"{target.name}: starting")
                await target.start()
            await _compare_samples(scenario, targets, on_round)
        for case in scenario.cases():
            result.cases.append(await _run_case(scenario, case, targets, repeats, on_round))
    finally:
        for target in targets:
            await target.stop()
    return result


async def _run_case(
    scenario: Scenario,
    case: Case,
    targets: Sequence[Target],
    repeats: int,
    on_round: Callable[[str], None],
) -> CaseResult:
    counted = CaseResult(case, [[] for _ in targets], [Counter() for _ in targets])
    everybody = tuple(range(len(targets)))
    pairs = round_order(repeats) if len(targets) == 2 else [everybody] * repeats
    for seed, order in enumerate([everybody, *pairs], start=WARM_UP):
        for index in order:
            target = targets[index]
            on_round(f"{target.name}: {case.name}")
            before, began_s = ProcessorTime.now(), time.perf_counter()
            round_ = await _take_round(scenario, case, target, seed)
            others_s = ProcessorTime.now().others_since(before)
            target.check()
            counted.errors[index].update(each.error for each in round_.answers if each.error)
            if not round_.good:
                return counted
            if seed != WARM_UP:
                counted.figures[index].append(dict(scenario.measure(round_)))
                counted.others.append(others_s / (time.perf_counter() - began_s))
    return counted


async def _take_round(scenario: Scenario, case: Case, target: Target, seed: int) -> Round:
    streams = scenario.streams(case, seed)
    if not scenario.starts:
        answers = await target.caller.call(streams)
        return Round(tuple(answers.each), answers.client_cpu_s)
    assert isinstance(target, Server)  # `run` has looked
    try:
        first_s = await target.first_answer(streams[0][0])
        answers = await target.caller.call(streams)
        assert target.pid is not None  # it has just answered
        memory = memory_of(target.pid)
    finally:
        await target.stop()
    return Round(tuple(answers.each), answers.client_cpu_s, first_s, memory)


async def _compare_samples(
    scenario: Scenario, targets: Sequence[Target], on_round: Callable[[str], None]
) -> None:
    if len(targets) < 2 or not (samples := scenario.samples()):
        return
    outputs = []
    for target in targets:
        on_round(f"{target.name}: samples")
        answers = await target.caller.call([samples])
        for answer in answers.each:
            if answer.error is not None:
                raise NotStarted(f"{target.name} cannot answer: {answer.error}")
        outputs.append([answer.output for answer in answers.each])
    for ours, peer in zip(*outputs, strict=True):
        if not scenario.alike(ours, peer):
            raise InvalidRun(
                f"the answers differ, so nothing can be compared: {targets[0].name} says"
                f" {ours[:EXCERPT]!r}, {targets[1].name} {peer[:EXCERPT]!r}"
            )
