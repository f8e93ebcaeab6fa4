"""The usage outlives the process, and no trouble with its file reaches a request."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.costs import usage_store
from engine.costs.usage_store import COUNTS, FILE_NAME, Counts, Row, UsageStore

ROOT = Path(__file__).parents[3]
LIMIT_S = 30.0


def counts(requests: int = 1, cost: float = 0.5) -> Counts:
    named = dict.fromkeys(COUNTS, 0.0) | {"requests": requests, "cost": cost}
    return tuple(named[name] for name in COUNTS)


def row(day: str = "2026-03-05", key: str = "alice", model: str = "m", provider: str = "") -> Row:
    return Row(day, key, model, provider)


@contextmanager
def opened(folder: Path) -> Iterator[UsageStore]:
    store = UsageStore(folder)
    store.open()
    try:
        yield store
    finally:
        store.close()


def costs(
    store: UsageStore,
    *by: str,
    since: str | None = None,
    until: str | None = None,
    key: str | None = None,
) -> dict[tuple[str, ...], float]:
    return {group: found[-2] for group, found in store.report(by, since, until, key)}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def on_disk(folder: Path) -> float:
    try:
        with sqlite3.connect(f"file:{folder / FILE_NAME}?mode=ro", uri=True) as connection:
            (cost,) = connection.execute("SELECT total(cost) FROM usage").fetchone()
    except sqlite3.Error:
        return 0.0
    return float(cost)


@pytest.mark.parametrize("wild", [10.0**30, float("inf"), float("nan"), -float("inf")])
def test_a_wild_number_stops_no_other(tmp_path: Path, wild: float) -> None:
    with opened(tmp_path) as store:
        for _ in range(2):
            store.add(row(model="wild"), tuple(wild for _ in COUNTS))
            assert store.report(("model",), None, None, None)
        store.add(row(), counts(cost=3.0))
        wait_for(lambda: on_disk(tmp_path) != 0)
        assert costs(store, "model")["m",] == 3.0
        assert store.spending("2026-03-05")


def test_counts_are_grouped_and_filtered(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row(), counts(cost=1.0))
        store.add(row(), counts(cost=2.0))
        store.add(row("2026-03-06", "bob", "n", "cloud"), counts(cost=4.0))
        store.add(row("2026-04-01", "bob"), counts(cost=8.0))
        assert costs(store, "key") == {("alice",): 3.0, ("bob",): 12.0}
        assert costs(store, "model") == {("m",): 11.0, ("n",): 4.0}
        assert costs(store, "provider") == {("",): 11.0, ("cloud",): 4.0}
        assert costs(store, "month") == {("2026-03",): 7.0, ("2026-04",): 8.0}
        assert costs(store, "day", "key", since="2026-03-06") == {
            ("2026-03-06", "bob"): 4.0,
            ("2026-04-01", "bob"): 8.0,
        }
        assert costs(store, "day", until="2026-03-05") == {("2026-03-05",): 3.0}
        assert costs(store, key="bob") == {(): 12.0}
        assert costs(store, key="nobody") == {}


def test_a_batch_is_written_within_a_second_without_being_asked(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row(), counts(cost=1.0))
        wait_for(lambda: on_disk(tmp_path) == 1.0)
        store.add(row(), counts(cost=1.0))
        wait_for(lambda: on_disk(tmp_path) == 2.0)


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from engine.costs.usage_store import COUNTS, Row, UsageStore\n"
        "store = UsageStore(Path(sys.argv[1])); store.open()\n"
        "store.add(Row('2026-03-05', '', 'm', ''), (1,) * len(COUNTS))\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    try:
        wait_for(lambda: on_disk(tmp_path) == 1.0)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    with opened(tmp_path) as store:
        assert costs(store) == {(): 1.0}


def test_old_days_are_folded_into_their_months(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for day in ("2025-01-03", "2025-01-04", "2025-02-01"):
            store.add(row(day), counts(cost=1.0))
            store.report((), None, None, None)  # each in a batch of its own
        store.add(row("2026-03-05"), counts(cost=1.0))
        days = {("2025-01",): 2.0, ("2025-02-01",): 1.0, ("2026-03-05",): 1.0}
        store.report((), None, None, None)
        assert costs(store, "day") == days | {("2025-01",): 2.0}
        store.add(row("2026-06-01"), counts(cost=1.0))
        assert costs(store, "month") == {
            ("2025-01",): 2.0, ("2025-02",): 1.0, ("2026-03",): 1.0, ("2026-06",): 1.0
        }  # fmt: skip
        # Of a folded month nobody knows the days: it counts whole.
        assert costs(store, since="2025-01-20") == {(): 5.0}
        assert costs(store, since="2025-02-20") == {(): 3.0}
        assert costs(store, until="2025-01-02") == {(): 2.0}


def test_a_damaged_file_is_left_alone_and_usage_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 1000)
    with opened(tmp_path) as store:
        store.add(row(), counts(cost=1.0))
        assert costs(store, "key") == {("alice",): 1.0}
        assert store.spending("2026-03-05") == {("alice", ""): (1.0, 1.0)}
    assert (tmp_path / FILE_NAME).read_bytes() == b"no database" * 1000
    assert "is left as it is" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file") as store:
        store.add(row(), counts(cost=1.0))
        assert costs(store) == {(): 1.0}
    assert "cannot be used" in caplog.text


def test_a_full_disk_loses_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_store, "RETRY_S", 0.01)
    with opened(tmp_path) as store:
        store.add(row(), counts(cost=1.0))
        assert costs(store) == {(): 1.0}
        assert store._connection is not None
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        for number in range(300):
            store.add(row(model=f"model-{number}"), counts(cost=1.0))
        assert costs(store) == {(): 301.0}
        assert costs(store, "model")["model-299",] == 1.0
        assert on_disk(tmp_path) == 1.0
        store._connection.execute("PRAGMA max_page_count = 1000000")
        wait_for(lambda: on_disk(tmp_path) == 301.0)
        assert costs(store) == {(): 301.0}
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2
    assert "full" in warnings[0] and "again" in warnings[1]


def test_a_newer_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    with opened(tmp_path) as store:
        store.add(row(), counts(cost=1.0))
        assert costs(store) == {(): 1.0}
    assert "a newer version" in caplog.text


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    with opened(tmp_path):
        files = [*tmp_path.glob(f"{FILE_NAME}*")]
        assert files
        assert [file.name for file in files if file.stat().st_mode & 0o077] == []
