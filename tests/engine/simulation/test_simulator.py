"""The simulator: traces, the modelled machine, the policies on it, and their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.requests import Priority
from engine.simulation.baselines import fifo_lru
from engine.simulation.clairvoyant import clairvoyant, lower_bound_s
from engine.simulation.comparison import FIFO_LRU, FIFO_LRU_DISK, OURS, compare
from engine.simulation.driver import simulate, usual_config
from engine.simulation.machine import Machine, Tier
from engine.simulation.outcome import Move, Outcome, Waits
from engine.simulation.traces import (
    BUILT_IN,
    Trace,
    TracedModel,
    TracedRequest,
    generate,
    read_trace,
)
from server.commands.cli import app as command

LOAD_S = 5.0
WAKE_S = 0.5


def model(nbytes: int = 60, **given: Any) -> TracedModel:
    return TracedModel.model_validate({"bytes": nbytes, "load_s": LOAD_S, **given})


def parkable(nbytes: int = 60, **given: Any) -> TracedModel:
    return model(nbytes, wake_s=WAKE_S, **given)


def trace(
    models: dict[str, TracedModel], *requests: tuple[float, str, float], host_bytes: int = 0
) -> Trace:
    """A device of 100 bytes, and requests given as arrival, model, run."""
    return Trace(
        "test",
        models,
        tuple(TracedRequest(at_s=at, model=name, run_s=run) for at, name, run in requests),
        budget_bytes=100,
        host_bytes=host_bytes,
    )


def ours(given: Trace, *, serial_device: bool = False, **limits: Any) -> Outcome:
    policy = usual_config(given).model_copy(update=limits)
    return simulate(given, policy, serial_device=serial_device)


def moves(outcome: Outcome) -> list[tuple[str, str]]:
    return [(each.move.value, each.model) for each in outcome.transitions]


class TestTraces:
    HEADER = '{"budget_bytes": "1KiB", "models": {"a": {"bytes": 512, "load_s": "2s"}}}'

    def write(self, folder: Path, *lines: str) -> Path:
        path = folder / "trace.jsonl"
        path.write_text("\n".join(lines))
        return path

    def test_a_file(self, tmp_path: Path) -> None:
        header = (
            '{"budget_bytes": "1KiB", "host_bytes": 2048, "measured_from_s": 1, "models":'
            ' {"a": {"blocks": {"weights": 256, "kv": 64}, "load_s": 2, "wake_s": "100ms",'
            ' "max_concurrency": 4}}}'
        )
        late = '{"at_s": 3, "model": "a", "run_s": 1, "priority": "batch", "timeout_s": 9}'
        early = '{"at_s": 0.5, "model": "a", "run_s": 1, "working_bytes": "128B"}'
        read = read_trace(self.write(tmp_path, header, late, "", early))
        assert (read.budget_bytes, read.host_bytes) == (1024, 2048)
        assert read.models["a"].nbytes == 320
        assert read.models["a"].wake_s == 0.1
        assert [each.at_s for each in read.requests] == [0.5, 3.0], "by arrival"
        assert read.requests[0].working_bytes == 128
        assert read.requests[1].priority is Priority.BATCH
        assert read.requests[1].timeout_s == 9
        assert read.measured == read.requests[1:]

    def test_a_short_file(self, tmp_path: Path) -> None:
        read = read_trace(
            self.write(tmp_path, self.HEADER, '{"at_s": 0, "model": "a", "run_s": 1}')
        )
        assert read.models["a"] == TracedModel(blocks={"weights": 512}, load_s=2.0)
        assert (read.host_bytes, read.measured_from_s, read.parks) == (0, 0.0, False)
        assert read.requests[0].priority is Priority.NORMAL
        assert read.requests[0].timeout_s == math.inf

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ('{"at_s": 0, "model": "b", "run_s": 1}', "'b' is not described"),
            ('{"at_s": 0, "model": "a", "run": 1}', "request.run: unknown key .did you mean run_s"),
            ('{"at_s": -1, "model": "a", "run_s": 1}', "at_s: a duration cannot be negative"),
            ('{"at_s": 0, "model": "a", "run_s": "forever"}', "must come and end"),
            ('{"at_s": 0, "model": "a", "run_s": 1, "priority": "high"}', "interactive, normal"),
            ('{"at_s": 0, "model": "a", "run_s": 1, "working_bytes": 513}', "needs 1.0 KiB of"),
            ("{", "trace.jsonl:2: not JSON"),
            ("", "there is no request"),
        ],
    )
    def test_a_wrong_line_is_named(self, tmp_path: Path, line: str, told: str) -> None:
        with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
            read_trace(self.write(tmp_path, self.HEADER, line))

    @pytest.mark.parametrize(
        "wrong",
        [
            '{"bytes": 1, "load_s": 1, "wake_s": 2}',
            '{"bytes": 1, "blocks": {"weights": 1}, "load_s": 1}',
            '{"bytes": 1, "load_s": "forever"}',
            '{"load_s": 1}',
        ],
    )
    def test_a_wrong_model_is_refused(self, tmp_path: Path, wrong: str) -> None:
        header = f'{{"budget_bytes": 9, "models": {{"a": {wrong}}}}}'
        with pytest.raises(ConfigError, match=r"trace\.jsonl:1"):
            read_trace(self.write(tmp_path, header, '{"at_s": 0, "model": "a", "run_s": 1}'))

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_the_same_seed_makes_the_same_trace(self, name: str) -> None:
        made = generate(name, seed=1, requests=60)
        assert made == generate(name, seed=1, requests=60)
        assert made != generate(name, seed=2, requests=60)
        assert len(made.requests) == 60
        assert sorted(made.requests, key=lambda each: each.at_s) == list(made.requests)

    @pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "abab"])
    def test_a_third_of_the_bytes_fit(self, name: str) -> None:
        made = generate(name)
        total_bytes = sum(each.nbytes for each in made.models.values())
        assert made.budget_bytes == total_bytes // 3
        assert made.host_bytes == total_bytes

    def test_an_unknown_or_empty_trace_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="zipf, bursts"):
            generate("zipff")
        with pytest.raises(ConfigError, match="at least one"):
            generate("zipf", requests=0)

    def test_memory_of_a_configuration(self) -> None:
        given = trace({"a": model(40)}, (0, "a", 1), host_bytes=100)
        models = (ModelConfig(id="a", source="folder"),)
        sizes = EngineConfig(memory="50%", host_memory=30, models=models)
        within = given.within(sizes)
        assert (within.budget_bytes, within.host_bytes) == (50, 30)
        assert given.within(EngineConfig(models=models)) == given
        with pytest.raises(ConfigError, match="needs 40 B of 39 B"):
            given.within(EngineConfig(memory=39, models=models))

    def test_faster(self) -> None:
        faster = trace({"a": model()}, (0, "a", 1), (4, "a", 1)).faster(2)
        assert [(each.at_s, each.run_s) for each in faster.requests] == [(0, 1), (2, 1)]
        with pytest.raises(ConfigError, match="positive"):
            faster.faster(0)

    def test_a_warmed_trace_begins_with_host_copies(self) -> None:
        models = {"a": parkable(), "b": parkable()}
        warmed = trace(models, (0, "a", 1), (0, "b", 1), host_bytes=120).warmed()
        for outcome in (ours(warmed), fifo_lru(warmed)):
            assert outcome.count(Move.LOAD) == 0
            assert [each.request.run_s for each in outcome.visits] == [1, 1]
            assert outcome.makespan_s < LOAD_S


class TestMachine:
    def machine(self, **given: Any) -> Machine:
        models = {"a": parkable(max_concurrency=2), "b": parkable(), "small": model(40)}
        requests = [(0, "a", 1)] * 3 + [(0, "b", 1)]
        return Machine(trace(models, *requests, host_bytes=60, **given))

    def play(self, machine: Machine, act: Callable[[], None]) -> None:
        machine.play(lambda index: act() if index == 0 else None)

    @pytest.mark.parametrize(
        ("name", "told"),
        [("b", "do not fit"), ("a", "is resident, not absent")],
    )
    def test_what_does_not_fit_cannot_be_loaded(self, name: str, told: str) -> None:
        machine = self.machine()

        def loaded(_: float) -> None:
            machine.load(name, lambda _: None)

        with pytest.raises(RuntimeError, match=told):
            self.play(machine, lambda: machine.load("a", loaded))

    def test_one_transition_at_a_time(self) -> None:
        machine = self.machine()

        def act() -> None:
            machine.load("a", lambda _: None)
            machine.load("small", lambda _: None)

        with pytest.raises(RuntimeError, match="'small' cannot move while 'a' does"):
            self.play(machine, act)

    def test_a_model_that_runs_cannot_leave(self) -> None:
        machine = self.machine()

        def loaded(_: float) -> None:
            machine.start(0, lambda: None)
            machine.unload("a", lambda: None)

        with pytest.raises(RuntimeError, match="'a' is in use"):
            self.play(machine, lambda: machine.load("a", loaded))

    def test_a_run_needs_its_model_and_a_lease_of_it(self) -> None:
        machine = self.machine()
        with pytest.raises(RuntimeError, match="not there to run on"):
            self.play(machine, lambda: machine.start(0, lambda: None))
        machine = self.machine()

        def loaded(_: float) -> None:
            for index in range(3):
                machine.start(index, lambda: None)

        with pytest.raises(RuntimeError, match="runs 2 requests already"):
            self.play(machine, lambda: machine.load("a", loaded))

    def test_a_model_without_a_host_copy_cannot_be_parked(self) -> None:
        machine = self.machine()

        def first(_: float) -> None:
            assert machine.host_free_bytes == 0
            machine.park("a", ["weights"], second)

        def second() -> None:
            machine.load("b", third)

        def third(_: float) -> None:
            machine.park("b", ["weights"], lambda: None)

        with pytest.raises(RuntimeError, match="'b' has no host copy"):
            self.play(machine, lambda: machine.load("a", first))
        assert machine.tiers["a"] is Tier.PARKED

    def test_a_request_that_nobody_served_is_an_error(self) -> None:
        machine = self.machine()
        machine.play(lambda index: None)
        with pytest.raises(RuntimeError, match="4 requests were neither served nor refused"):
            machine.outcome()

    def test_runs_share_a_serial_device_equally(self) -> None:
        given = trace({"a": model(max_concurrency=3)}, (0, "a", 1), (0, "a", 3), (7, "a", 2))
        ends = {
            serial: [visit.ended_s for visit in ours(given, serial_device=serial).visits]
            for serial in (False, True)
        }
        assert ends[False] == pytest.approx([6, 8, 9])
        # 5–7 two runs: the first ends, the second has 2 left; 7–11 two runs again: both end.
        assert ends[True] == pytest.approx([7, 11, 11])

    def test_parts_are_parked_and_woken_for_their_share(self) -> None:
        blocks = {"weights": 60, "cache": 20}
        big = TracedModel(blocks=blocks, load_s=LOAD_S, wake_s=4.0)
        given = trace(
            {"big": big, "b": parkable(40)}, (0, "big", 1), (8, "b", 1), (20, "big", 1),
            host_bytes=120,
        )  # fmt: skip
        outcome = ours(given)
        parked = next(each for each in outcome.transitions if each.move is Move.PARK)
        woken = next(each for each in outcome.transitions if each.move is Move.WAKE)
        assert parked.model == woken.model == "big"
        assert woken.ended_s - woken.began_s == pytest.approx(4.0 * woken.nbytes / 80)


class TestOurs:
    def test_a_cold_request_waits_for_its_load(self) -> None:
        outcome = ours(trace({"a": model()}, (3, "a", 2)))
        visit = outcome.visits[0]
        assert (visit.wait_s, visit.ended_s) == (LOAD_S, 3 + LOAD_S + 2)
        assert outcome.makespan_s == LOAD_S + 2
        assert moves(outcome) == [("load", "a"), ("unload", "a")], "keep_alive is over at last"

    def test_with_host_memory_models_are_parked_and_woken(self) -> None:
        models = {"a": parkable(), "b": parkable()}
        requests = ((0, "a", 1), (20, "b", 1), (40, "a", 1))
        with_host = ours(trace(models, *requests, host_bytes=120))
        assert moves(with_host)[:5] == [
            ("load", "a"), ("park", "a"), ("load", "b"), ("park", "b"), ("wake", "a"),
        ]  # fmt: skip
        assert with_host.visits[2].wait_s == WAKE_S
        assert with_host.bytes_moved == 180
        without = ours(trace(models, *requests))
        assert without.visits[2].wait_s == LOAD_S
        assert without.count(Move.PARK) == without.count(Move.WAKE) == 0

    def test_limits_of_the_configuration_count(self) -> None:
        models = {"a": model(max_concurrency=8), "b": model()}
        requests = [(0.0, "b", 1.0), *((1 + at / 2, "a", 3.0) for at in range(100)), (9, "b", 1.0)]
        given = trace(models, *sorted(requests))
        waits_s = {
            limit: max(
                each.wait_s
                for each in ours(given, max_overtake_s=limit).visits
                if each.request.model == "b" and each.request.at_s == 9
            )
            for limit in (5.0, 20.0)
        }
        assert 5 <= waits_s[5.0] < 20 <= waits_s[20.0]

    def test_a_pinned_model_stays(self) -> None:
        given = trace({"a": model(), "b": model(30)}, (0, "a", 1), (9, "b", 1))
        pinned = ModelConfig(id="a", source="folder", pin=True, keep_alive=1.0)
        policy = usual_config(given).model_copy(update={"models": (pinned,)})
        assert "a" not in [name for move, name in moves(simulate(given, policy)) if move != "load"]

    def test_who_waits_too_long_is_refused(self) -> None:
        request = TracedRequest(at_s=0, model="a", run_s=1, timeout_s=2)
        for outcome in (
            ours(Trace("test", {"a": model()}, (request,), 100)),
            fifo_lru(Trace("test", {"a": model()}, (request,), 100)),
        ):
            assert outcome.refused == 1
            assert outcome.visits[0].wait_s == 2
            assert outcome.makespan_s == 0

    def test_a_full_queue_refuses(self) -> None:
        given = trace({"a": model()}, (0, "a", 1), (0, "a", 1))
        assert ours(given, max_queue=1).refused == 1

    def test_the_longest_wait_as_the_oldest(self) -> None:
        """The second waits 6 s, but for 5 of them the first is older; nothing moves after."""
        given = trace({"a": model()}, (0, "a", 3), (0, "a", 1))
        head = ours(given).head_wait()
        assert (head.since_s, head.wait_s, head.transitions_s) == (LOAD_S, 3, 0)

    def test_overtaking_is_noticed(self) -> None:
        """`b` cannot come while `a` runs; each later request for `a` overtakes it."""
        models = {"a": model(max_concurrency=64), "b": model()}
        requests = [(at / 2, "a", 3.0) for at in range(80)]
        given = trace(models, *sorted([*requests, (9.0, "b", 1.0)]))
        assert 8 < ours(given, max_overtake_s=10.0).worst_overtake_s <= 10
        assert 1 < ours(given, max_overtake_s=3.0).worst_overtake_s <= 3
        assert fifo_lru(given).worst_overtake_s == 0

    def test_who_waits_for_its_own_load_is_not_overtaken(self) -> None:
        models = {"a": model(max_concurrency=8), "slow": model(40, load_s=30.0)}
        later = [(11.0 + at, "a", 1.0) for at in range(20)]
        outcome = ours(trace(models, (0, "a", 1), (10, "slow", 1), *later))
        assert [visit.wait_s for visit in outcome.visits[1:4]] == [30, 0, 0]
        assert outcome.worst_overtake_s == 0

    def test_priorities_count_as_the_trace_gives_them(self) -> None:
        requests = tuple(
            TracedRequest(at_s=0, model="a", run_s=1, priority=priority)
            for priority in (Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE)
        )
        given = Trace("test", {"a": model()}, requests, 100)
        assert [visit.left_s for visit in ours(given).visits] == [7, 6, 5]
        assert [visit.left_s for visit in fifo_lru(given).visits] == [5, 6, 7]
        kinds = list(ours(given).waits_by_kind())
        assert kinds == [("a", priority) for priority in sorted(Priority)]


class TestFifoLru:
    def test_the_first_holds_up_the_rest(self) -> None:
        given = trace({"a": model(), "b": model()}, (0, "a", 1), (0, "b", 1), (0, "a", 1))
        outcome = fifo_lru(given)
        assert [name for move, name in moves(outcome) if move == "load"] == ["a", "b", "a"]
        assert [visit.left_s for visit in outcome.visits] == [5, 11, 17]
        assert ours(given).swaps == 2, "ours serves the third before it leaves"

    def test_the_least_recently_used_leaves(self) -> None:
        models = {name: model(45) for name in "abc"}
        given = trace(models, (0, "a", 1), (10, "b", 1), (20, "a", 1), (30, "c", 1))
        assert ("unload", "b") in moves(fifo_lru(given))
        assert ("unload", "a") not in moves(fifo_lru(given))

    def test_it_wakes_what_has_a_host_copy(self) -> None:
        models = {"a": parkable(), "b": parkable()}
        given = trace(models, (0, "a", 1), (9, "b", 1), (20, "a", 1), host_bytes=60)
        outcome = fifo_lru(given)
        assert moves(outcome) == [
            ("load", "a"), ("park", "a"), ("load", "b"), ("unload", "b"), ("wake", "a"),
        ]  # fmt: skip
        assert outcome.visits[2].wait_s == WAKE_S

    def test_runs_go_on_beside_each_other(self) -> None:
        given = trace({"a": model(max_concurrency=2)}, *[(0.0, "a", 4.0)] * 3)
        assert [visit.left_s for visit in fifo_lru(given).visits] == [5, 5, 9]


@pytest.mark.slow
class TestClairvoyant:
    @pytest.mark.parametrize(
        ("requests", "best_s"),
        [
            # One model: load, then the two runs one after the other.
            ([(0, "a", 1), (0, "a", 2)], 8),
            # Both of `a` first, then both of `b`.
            ([(0, "a", 1), (0, "b", 1), (0, "a", 1), (0, "b", 1)], 14),
            # `b` is brought in before it is asked for.
            ([(0, "a", 1), (20, "b", 1)], 21),
            # `small` is loaded while `a` runs, and `b` while `small` runs.
            ([(0, "a", 5), (0, "small", 5), (0, "b", 1)], 16),
            # `b` goes first, so that `a` is loaded once.
            ([(0, "a", 1), (0, "b", 1), (8, "a", 1)], 13),
        ],
    )
    def test_small_traces_are_answered_exactly(
        self, requests: list[tuple[float, str, float]], best_s: float
    ) -> None:
        given = trace({"a": model(), "b": model(), "small": model(40)}, *requests)
        answer = clairvoyant(given)
        assert answer.exact
        assert answer.makespan_s == pytest.approx(best_s)

    def test_it_parks_and_wakes(self) -> None:
        models = {"a": parkable(), "b": parkable()}
        requests = ((0, "a", 1), (10, "b", 1), (20, "a", 1))
        assert clairvoyant(trace(models, *requests, host_bytes=120)).makespan_s == 21
        late = ((0, "a", 1), (19, "b", 1), (20, "a", 1))
        assert clairvoyant(trace(models, *late, host_bytes=120)).makespan_s == 21.5
        assert clairvoyant(trace(models, *late)).makespan_s == 26

    def test_the_exact_answer_is_between_the_bound_and_every_policy(self) -> None:
        found: list[tuple[bool, bool]] = []

        @settings(max_examples=120, derandomize=True)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            given = data.draw(small_traces())
            bound_s = lower_bound_s(given)
            answer = clairvoyant(given)
            reached_s = min(ours(given).makespan_s, fifo_lru(given).makespan_s)
            assert bound_s <= reached_s * (1 + 1e-9)
            if answer.exact:
                assert bound_s <= answer.makespan_s * (1 + 1e-9)
                assert answer.makespan_s <= reached_s * (1 + 1e-9)
                # What is known of the answer beforehand must not change it.
                told = clairvoyant(given, reached_s)
                assert not told.exact or told.makespan_s == pytest.approx(answer.makespan_s)
                found.append((answer.makespan_s > bound_s, answer.makespan_s < reached_s))

        check()
        assert any(above for above, _ in found), "the search would have been for nothing"
        assert any(below for _, below in found)

    @settings(max_examples=60)
    @given(st.data())
    def test_the_bound_holds_for_every_machine(self, data: st.DataObject) -> None:
        given = data.draw(small_traces())
        if data.draw(st.booleans()):
            given = given.warmed()
        for serial in (False, True):
            bound_s = lower_bound_s(given, serial_device=serial)
            assert bound_s <= ours(given, serial_device=serial).makespan_s * (1 + 1e-9)
            assert bound_s <= fifo_lru(given, serial_device=serial).makespan_s * (1 + 1e-9)

    def test_the_bound_counts_bytes(self) -> None:
        """Three of 40 bytes: two fit, so one waits; by bytes 3 × 6 × 40 / 100 s, by halves 9 s."""
        models = {name: model(40, load_s=0.0) for name in "abc"}
        assert lower_bound_s(trace(models, *[(0.0, name, 6.0) for name in "abc"])) == 9

    def test_a_large_trace_has_a_bound(self) -> None:
        given = generate("zipf", requests=100)
        answer = clairvoyant(given)
        assert not answer.exact
        assert answer.makespan_s == lower_bound_s(given)


@st.composite
def small_traces(draw: st.DrawFn) -> Trace:
    """Up to three models and six requests, with and without host memory."""
    wake_s = draw(st.sampled_from([None, 0.5]))
    models = {
        name: TracedModel(
            blocks={"weights": draw(st.integers(20, 90))},
            load_s=draw(st.sampled_from([1.0, 4.0])),
            wake_s=wake_s,
            unload_s=draw(st.sampled_from([0.0, 0.5])),
            max_concurrency=draw(st.integers(1, 2)),
        )
        for name in "abc"
    }
    at_s = 0.0
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        at_s += draw(st.sampled_from([0.0, 0.0, 1.0, 6.0]))
        run_s = draw(st.sampled_from([0.5, 1.0, 3.0]))
        working_bytes = draw(st.sampled_from([0, 0, 10]))
        requests.append(
            TracedRequest(
                at_s=at_s,
                model=draw(st.sampled_from("abc")),
                run_s=run_s,
                working_bytes=working_bytes,
            )
        )
    return Trace("small", models, tuple(requests), 100, draw(st.sampled_from([0, 300])))


@pytest.mark.slow
class TestComparison:
    def test_the_zipf_mix(self) -> None:
        given = generate("zipf").warmed()
        comparison = compare(given, usual_config(given))
        outcome, fifo = comparison.outcomes[OURS], comparison.outcomes[FIFO_LRU]
        assert outcome.refused == fifo.refused == 0
        assert outcome.makespan_s <= 0.70 * fifo.makespan_s
        assert outcome.makespan_s <= 1.15 * comparison.clairvoyant.makespan_s
        assert outcome.waits().max_s <= comparison.max_overtake_s + comparison.service_s
        assert outcome.worst_overtake_s <= comparison.max_overtake_s

    def test_two_models_in_turn(self) -> None:
        given = generate("abab")
        comparison = compare(given, usual_config(given))
        assert comparison.outcomes[FIFO_LRU].swaps == len(given.requests)
        assert comparison.outcomes[OURS].swaps <= 0.5 * comparison.outcomes[FIFO_LRU].swaps

    @pytest.mark.parametrize("name", ["bursts", "day", "clients-1000"])
    def test_the_other_traces_are_served(self, name: str) -> None:
        given = generate(name, requests=300)
        comparison = compare(given, usual_config(given))
        for outcome in comparison.outcomes.values():
            assert outcome.refused == 0
            assert comparison.clairvoyant.makespan_s <= outcome.makespan_s * (1 + 1e-9)

    def test_the_document(self) -> None:
        given = generate("zipf", requests=40)
        document = json.loads(json.dumps(compare(given, usual_config(given)).document()))
        assert set(document["policies"]) == {OURS, FIFO_LRU, FIFO_LRU_DISK}
        figures = document["policies"][OURS]
        assert figures["swaps"] == figures["moves"]["load"] + figures["moves"]["wake"]
        assert sum(kind["count"] for kind in figures["waits_by_kind"]) == 40
        assert figures["waits"]["count"] == 40

    def test_percentiles_are_by_nearest_rank(self) -> None:
        waits = Waits.of([float(number) for number in range(20, 0, -1)])
        assert (waits.p50_s, waits.p95_s, waits.max_s) == (10, 19, 20)
        assert Waits.of([3.0]) == Waits(1, 3.0, 3.0, 3.0)


@pytest.mark.slow
class TestCommand:
    def invoke(self, *arguments: str) -> Any:
        return CliRunner(env={"COLUMNS": "160"}).invoke(command, ["simulate", *arguments])

    def test_a_built_in_trace(self, tmp_path: Path) -> None:
        figures = tmp_path / "figures.json"
        result = self.invoke("abab", "--requests", "20", "--json", str(figures))
        assert result.exit_code == 0, result.output
        assert "abab: 20 requests" in result.output
        assert "FIFO + LRU" in result.output
        assert json.loads(figures.read_text())["trace"]["requests"] == 20

    def test_options_of_the_trace(self, tmp_path: Path) -> None:
        figures = tmp_path / "figures.json"
        given = ("--requests", "21", "--models", "3", "--speed", "2", "--warm")
        assert self.invoke("abab", *given, "--json", str(figures)).exit_code == 0
        document = json.loads(figures.read_text())
        assert document["trace"]["models"] == 3
        assert document["trace"]["last_arrival_s"] == pytest.approx(10)
        assert document["policies"][OURS]["moves"]["load"] == 0
        assert document["policies"][FIFO_LRU_DISK]["moves"]["wake"] == 0
        assert document["serial_device"] is False
        self.invoke("abab", "--serial-device", "--json", str(figures))
        assert json.loads(figures.read_text())["serial_device"] is True

    def test_a_file_and_a_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.jsonl"
        path.write_text(
            '{"budget_bytes": 100, "models": {"a": {"bytes": 60, "load_s": 5}}}\n'
            '{"at_s": 0, "model": "a", "run_s": 1}\n'
        )
        config = tmp_path / "config.yaml"
        config.write_text(
            "engine: {max_overtake_s: 7, memory: 59B}\nmodels: [{id: a, source: folder}]\n"
        )
        assert "clairvoyant" in self.invoke(str(path)).output
        result = self.invoke(str(path), "--config", str(config))
        assert result.exit_code == 2
        assert "needs 60 B of 59 B" in result.stderr
        config.write_text("engine: {max_overtake_s: 7}\nmodels: [{id: a, source: folder}]\n")
        assert "max_overtake_s is 7.0 s" in self.invoke(str(path), "--config", str(config)).output

    def test_a_plot(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        picture = tmp_path / "waits.png"
        result = self.invoke("zipf", "--requests", "30", "--warm", "--plot", str(picture))
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_what_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        result = self.invoke("abab", "--requests", "2", "--json", str(tmp_path / "no" / "file"))
        assert result.exit_code == 1
        assert "cannot write" in result.stderr

    def test_an_unknown_trace(self) -> None:
        result = self.invoke("zipff")
        assert result.exit_code == 2
        assert "no such file; built in are zipf" in result.stderr
