"""Device time: what runs share adds up to the time that any of them ran."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.costs.device_time import DeviceTime, Share


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(
    st.tuples(st.floats(0, 1000, allow_nan=False), st.booleans(), st.integers(0, 20)), max_size=60
)


@given(STEPS)
def test_each_run_has_its_share_and_together_they_have_all(
    steps: list[tuple[float, bool, int]],
) -> None:
    clock = Clock()
    device_time = DeviceTime(clock)
    running: list[tuple[Share, list[float]]] = []
    ended: list[tuple[Share, list[float]]] = []
    busy_s = 0.0
    for wait_s, begins, index in steps:
        clock.now += wait_s
        # As the definition says it, in time that grows with the number of runs.
        for _, parts in running:
            parts.append(wait_s / len(running))
        busy_s += wait_s if running else 0.0
        if begins:
            running.append((device_time.begin(), []))
        elif running:
            share, parts = running.pop(index % len(running))
            share.end()
            ended.append((share, parts))
        assert device_time.running == len(running)
    for share, _ in running:
        share.end()
    every = ended + running
    for share, parts in every:
        assert share.end() == pytest.approx(sum(parts), abs=1e-6)
    assert sum(share.end() for share, _ in every) == pytest.approx(busy_s, abs=1e-6)


def test_a_second_end_neither_counts_nor_changes_the_others() -> None:
    clock = Clock()
    device_time = DeviceTime(clock)
    first, second = device_time.begin(), device_time.begin()
    clock.now = 4.0
    assert first.end() == 2.0
    clock.now = 5.0
    assert first.end() == 2.0
    assert device_time.running == 1
    assert second.end() == 3.0
