"""Takes the turns of a measurement and keeps what came of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.bench.errors import BadSetUp, NotStarted, Void
from server.bench.figures import Comparison, Figure, Spread, turns
from server.bench.memory import memory_of
from server.bench.processor import ProcessorTime
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.sides import Server, Side
from server.bench.work import Turn

EXCERPT = 120
"""Characters of a sample's answer that a difference tells."""
OTHERS_CORES = 0.1
"""From where on what other programs do is told."""
WARM_UP = 0
"""The seed of the turn that is not counted."""


@dataclass(slots=True)
class CaseResult:
    """What one row of a scenario gave. The outer index is the side's."""

    case: Case
    figures: list[list[dict[str, float]]]
    """Of each turn; a turn without a good answer has none and ends the case."""
    errors: list[Counter[str]]
    """What was wrong with answers, and how often, the warm-up's among them."""
    others: list[float] = field(default_factory=list)
    """Of each turn, how many cores other programs kept busy."""

    def values(self, side: int, figure: Figure) -> list[float]:
        """A figure of one side, turn by turn."""
        return [each[figure.name] for each in self.figures[side]]

    def spread(self, side: int, figure: Figure) -> Spread | None:
        """How a figure spreads over the turns; None if there were none."""
        values = self.values(side, figure)
        return Spread.of(values) if values else None

    def comparison(self, figure: Figure) -> Comparison | None:
        """Both sides of a figure; None unless there are two and each pair is whole."""
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
    sides: Sequence[Side]
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Answers that were none, of all sides and cases."""
        return sum(each.total() for case in self.cases for each in case.errors)

    def warnings(self) -> list[str]:
        """What a reader must know beside the figures."""
        found = []
        started = all(side.command for side in self.sides)
        for case in self.cases:
            if started and case.others and (cores := Spread.of(case.others).median) > OTHERS_CORES:
                found.append(f"{case.case.name}: other programs kept {cores:.1f} cores busy")
            for side, counted in zip(self.sides, case.errors, strict=True):
                for reason, number in counted.most_common():
                    found.append(f"{case.case.name}, {side.name}: {number} × {reason}")
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


def turn_count(scenario: Scenario, sides: int, repeats: int) -> int:
    """How many turns there will be, warm-ups and samples among them."""
    samples = sides if sides > 1 and scenario.samples() and not scenario.starts else 0
    return samples + len(scenario.cases()) * sides * (repeats + 1)


async def run(
    scenario: Scenario, sides: Sequence[Side], repeats: int, on_turn: Callable[[str], None]
) -> Result:
    """Measure one side, or two in pairs of turns: A B, B A and so on.

    `on_turn` is told what comes next. All sides are up meanwhile, unless the scenario is about
    starting: then each turn has its own process, alone.

    Raises:
        NotStarted: a side did not come up, or died.
        Void: the two give different answers.
        BadSetUp: the scenario has to start its side, and this one was there.

    """
    result = Result(scenario, sides)
    if scenario.starts and not all(isinstance(side, Server) for side in sides):
        raise BadSetUp(f"{scenario.name} is about starting a server, and this one runs already")
    try:
        if not scenario.starts:
            for side in sides:
                on_turn(f"{side.name}: starting")
                await side.start()
            await _compare_samples(scenario, sides, on_turn)
        for case in scenario.cases():
            result.cases.append(await _run_case(scenario, case, sides, repeats, on_turn))
    finally:
        for side in sides:
            await side.stop()
    return result


async def _run_case(
    scenario: Scenario,
    case: Case,
    sides: Sequence[Side],
    repeats: int,
    on_turn: Callable[[str], None],
) -> CaseResult:
    counted = CaseResult(case, [[] for _ in sides], [Counter() for _ in sides])
    everybody = tuple(range(len(sides)))
    pairs = turns(repeats) if len(sides) == 2 else [everybody] * repeats
    for seed, order in enumerate([everybody, *pairs], start=WARM_UP):
        for index in order:
            side = sides[index]
            on_turn(f"{side.name}: {case.name}")
            before, began_s = ProcessorTime.now(), time.perf_counter()
            turn = await _take_turn(scenario, case, side, seed)
            others_s = ProcessorTime.now().others_since(before)
            side.check()
            counted.errors[index].update(each.error for each in turn.answers if each.error)
            if not turn.good:
                return counted
            if seed != WARM_UP:
                counted.figures[index].append(dict(scenario.measure(turn)))
                counted.others.append(others_s / (time.perf_counter() - began_s))
    return counted


async def _take_turn(scenario: Scenario, case: Case, side: Side, seed: int) -> Turn:
    streams = scenario.streams(case, seed)
    if not scenario.starts:
        answers = await side.caller.call(streams)
        return Turn(tuple(answers.each), answers.client_cpu_s)
    assert isinstance(side, Server)  # `run` has looked
    try:
        first_s = await side.first_answer(streams[0][0])
        answers = await side.caller.call(streams)
        assert side.pid is not None  # it has just answered
        memory = memory_of(side.pid)
    finally:
        await side.stop()
    return Turn(tuple(answers.each), answers.client_cpu_s, first_s, memory)


async def _compare_samples(
    scenario: Scenario, sides: Sequence[Side], on_turn: Callable[[str], None]
) -> None:
    if len(sides) < 2 or not (samples := scenario.samples()):
        return
    outputs = []
    for side in sides:
        on_turn(f"{side.name}: samples")
        answers = await side.caller.call([samples])
        for answer in answers.each:
            if answer.error is not None:
                raise NotStarted(f"{side.name} cannot answer: {answer.error}")
        outputs.append([answer.output for answer in answers.each])
    for ours, peer in zip(*outputs, strict=True):
        if not scenario.alike(ours, peer):
            raise Void(
                f"the answers differ, so nothing can be compared: {sides[0].name} says"
                f" {ours[:EXCERPT]!r}, {sides[1].name} {peer[:EXCERPT]!r}"
            )
