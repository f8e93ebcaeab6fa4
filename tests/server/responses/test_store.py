"""The file of responses: its bounds, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, NotFound
from server.responses.records import Conversation, Kept
from server.responses.store import FILE_NAME, ResponseStore
from tests.server.real import ROOT

DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[ResponseStore]:
    store = ResponseStore(tmp_path, 100_000, DAY_S, clock)
    yield store
    store.close()


def item(item_id: str, text: str = "x") -> dict[str, Any]:
    return {"id": item_id, "type": "message", "role": "user", "content": text}


def add(store: ResponseStore, name: str, previous: str | None = None, **more: Any) -> None:
    thread = more.pop("thread", name)
    size = more.pop("size", 1)
    document = {"id": name, "status": more.pop("status", "completed")}
    kept = Kept(
        id=name, owner="", thread=thread, document=document, created_at=1, previous=previous, **more
    )
    store.save(kept, [item(f"in-{name}", "i" * size)], [item(f"out-{name}")], spoken=True)


def is_there(store: ResponseStore, name: str) -> bool:
    try:
        store.response(name, None)
    except NotFound:
        return False
    return True


def test_the_least_recently_used_thread_leaves_as_a_whole(
    store: ResponseStore, clock: Clock
) -> None:
    for name in ("a", "b", "c"):
        clock.now += 1
        add(store, name, size=25_000)
    clock.now += 1
    add(store, "a2", "a", thread="a", size=10_000)  # so `b` is the oldest
    clock.now += 1
    add(store, "d", size=25_000)
    assert [name for name in ("a", "a2", "b", "c", "d") if is_there(store, name)] == [
        "a", "a2", "c", "d",
    ]  # fmt: skip
    clock.now += 1
    add(store, "e", size=25_000)
    clock.now += 1
    add(store, "f", size=25_000)
    assert not is_there(store, "a")
    assert not is_there(store, "a2")
    threads, nbytes = store.held()
    assert threads == 3
    assert nbytes <= 100_000


def test_bytes_are_those_of_what_is_there(store: ResponseStore, tmp_path: Path) -> None:
    store.add_conversation(Conversation("conv", "", 1, {"a": "b"}), [item("1"), item("2", "é" * 9)])
    add(store, "r", thread="conv", conversation="conv", size=1000)
    add(store, "s", "r", thread="conv")
    store.delete_item("conv", "1", None)
    store.delete_response("s", None)
    store.change_conversation("conv", None, {"c": "d" * 100})
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    texts = [
        *connection.execute("SELECT item FROM items"),
        *connection.execute("SELECT document FROM responses"),
        *connection.execute("SELECT metadata FROM conversations"),
    ]
    connection.close()
    assert store.held() == (1, sum(len(text) + 256 for (text,) in texts))


def test_what_is_old_is_gone(store: ResponseStore, clock: Clock) -> None:
    add(store, "a")
    store.add_conversation(Conversation("conv", "", 1), [item("1")])
    clock.now += DAY_S - 1
    add(store, "a2", "a", thread="a")
    clock.now += 2
    assert is_there(store, "a"), "it counts from the last turn"
    with pytest.raises(NotFound):
        store.conversation("conv", None)
    clock.now += DAY_S
    assert not is_there(store, "a2")
    add(store, "b")
    assert store.held()[0] == 1


def test_a_job_does_not_leave_before_it_has_ended(store: ResponseStore, clock: Clock) -> None:
    add(store, "job", status="queued", background=True, job={"body": "j" * 50_000})
    for name in ("a", "b", "c"):
        clock.now += 1
        add(store, name, size=40_000)
    assert [kept.id for kept in store.unfinished()] == ["job"]
    assert store.end_run("job", {"status": "completed"}, [item("1")], None, [])
    assert not store.end_run("job", {"status": "failed"}, [item("2")], None, [])
    assert store.document("job", None)["status"] == "completed"
    assert not store.unfinished()


def test_nothing_is_left_of_a_chain_that_is_deleted(store: ResponseStore) -> None:
    add(store, "a")
    add(store, "b", "a", thread="a")
    add(store, "c", "a", thread="a")
    for name in ("a", "b"):
        store.delete_response(name, None)
    assert [each["id"] for each in store.context("c")] == ["in-a", "out-a", "in-c", "out-c"]
    assert store.find_items(["in-a", "out-b", "in-c"], None).keys() == {"in-c"}
    store.delete_response("c", None)
    assert store.held() == (0, 0)
    assert not store.context("c")


def test_a_long_chain(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, 2**30, DAY_S)
    for number in range(1500):
        add(store, str(number), str(number - 1) if number else None, thread="0")
    assert len(store.context("1499")) == 3000
    assert store.context("1499")[0]["id"] == "in-0"
    store.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    ResponseStore(tmp_path, 1000, DAY_S).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        ResponseStore(tmp_path, 1000, DAY_S)


WRITER = """
import sys
from pathlib import Path
from tests.server.responses.test_store import DAY_S, add, item
from server.responses.records import Conversation
from server.responses.store import ResponseStore

store = ResponseStore(Path(sys.argv[1]), 2**30, DAY_S)
store.add_conversation(Conversation("conv", "", 1), [])
number = 0
while True:
    add(store, f"r{number}", thread="conv", conversation="conv", size=5000)
    print(number, flush=True)
    number += 1
"""


def test_a_kill_in_the_middle_of_writes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        for line in lines:
            if int(line) >= 200:
                break
        process.send_signal(signal.SIGKILL)
        said = max([200, *(int(line) for line in lines if line.endswith("\n"))])
    store = ResponseStore(tmp_path, 2**30, DAY_S)
    number = 0
    while is_there(store, f"r{number}"):
        number += 1
    assert number in (said + 1, said + 2), "what was said to be kept is, and no more than one more"
    _, members, _ = store.members("conv", None)
    names = [f"{part}-r{each}" for each in range(number) for part in ("in", "out")]
    assert [each["id"] for each in members] == names, "each turn whole"
    store.close()
