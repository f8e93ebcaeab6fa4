"""Answers in a file: bounds, age, damage, and processes that die."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from server.response_cache.entry import Entry
from server.response_cache.sqlite_store import APPLICATION_ID, ROW_BYTES, SqliteStore
from tests.server.response_cache.conftest import until

ROOT = Path(__file__).parents[3]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "response-cache.sqlite3"


def key(number: int) -> bytes:
    return number.to_bytes(32)


def entry(number: int, nbytes: int = 1000) -> Entry:
    body = f"answer {number} ".encode().ljust(nbytes, b".")
    return Entry(200, {"content-type": "text/plain"}, (body[:10], body[10:]), streamed=True)


def put(store: SqliteStore, number: int, nbytes: int = 1000) -> None:
    made = entry(number, nbytes)
    store.put(key(number), made.nbytes, lambda: made.encode(key(number)))


def status(path: Path) -> os.stat_result:
    return path.stat()


async def written(store: SqliteStore) -> None:
    """Wait until everything before is written: one thread does it in order."""
    await asyncio.wrap_future(store._writer.submit(lambda: None))


async def test_what_was_put_is_there_after_a_restart(path: Path, clock: Clock) -> None:
    for _ in range(2):
        store = SqliteStore(path, 10**6, 60, clock)
        await store.start()
        put(store, 1)
        await written(store)
        assert await store.get(key(1)) == entry(1)
        assert await store.get(key(2)) is None
        await store.close()
    assert store.kept().entries == 1
    assert status(path).st_mode & 0o077 == 0


@pytest.mark.parametrize("restarts", [False, True])
async def test_the_least_recently_used_go_first(path: Path, clock: Clock, restarts: bool) -> None:
    size = len(entry(1).encode(key(1))) + ROW_BYTES
    store = SqliteStore(path, 5 * size, 10_000, clock)
    await store.start()
    for number in range(5):
        put(store, number)
        clock.now += 1
        await written(store)
    assert await store.get(key(0)) is not None
    if restarts:
        await store.close()
        store = SqliteStore(path, 5 * size, 10_000, clock)
        await store.start()
    for number in range(5, 8):
        clock.now += 1
        put(store, number)
        await written(store)
        assert store.kept().nbytes <= 5 * size
    there = [number for number in range(8) if await store.get(key(number)) is not None]
    assert there == [0, 4, 5, 6, 7]
    assert store.kept().entries == 5
    await store.close()


async def test_a_smaller_bound_holds_from_the_start(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**7, 60, clock)
    await store.start()
    for number in range(300):
        put(store, number, 5000)
    await written(store)
    await store.close()
    before = status(path).st_size
    store = SqliteStore(path, 100_000, 60, clock)
    await store.start()
    assert 0 < store.kept().nbytes <= 100_000
    await store.close()
    assert status(path).st_size < before / 4


async def test_the_file_stays_near_its_bound(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 200_000, 60, clock)
    await store.start()
    for number in range(400):
        put(store, number, 5000)
    await written(store)
    await store.close()
    assert status(path).st_size < 400_000


async def test_an_old_answer_is_gone(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    put(store, 1)
    await written(store)
    clock.now += 59.9
    assert await store.get(key(1)) is not None  # a hit does not make it younger
    clock.now += 0.1
    assert await store.get(key(1)) is None
    put(store, 2)
    await written(store)
    assert store.kept().entries == 1
    await store.close()


async def test_an_answer_may_be_kept_for_ever(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, float("inf"), clock)
    await store.start()
    put(store, 1)
    await written(store)
    clock.now += 10**9
    put(store, 2)
    await written(store)
    assert await store.get(key(1)) == entry(1)
    await store.close()


async def test_a_replaced_answer_counts_once(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    put(store, 1, 5000)
    put(store, 1, 1000)
    await written(store)
    size = len(entry(1).encode(key(1))) + ROW_BYTES
    assert (store.kept().entries, store.kept().nbytes) == (1, size)
    assert await store.get(key(1)) == entry(1)
    await store.close()


async def test_an_entry_of_another_key_is_not_served(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    store.put(key(2), 1000, lambda: entry(1).encode(key(1)))
    await written(store)
    assert await store.get(key(2)) is None

    async def removed() -> bool:
        return store.kept().entries == 0

    await until(removed)
    await store.close()


async def test_a_full_disk_turns_it_off(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(path, 10**7, 60, clock)
    await store.start()
    put(store, 1)
    await written(store)
    assert store._writing is not None
    pages = store._writing.execute("PRAGMA page_count").fetchone()[0]
    store._writing.execute(f"PRAGMA max_page_count = {pages + 2}")
    with caplog.at_level(logging.WARNING):
        for number in range(2, 9):
            put(store, number, 50_000)
        await written(store)
    assert store.off_reason == "database or disk is full"
    assert len(caplog.messages) == 1
    assert await store.get(key(1)) is None
    await store.close()


async def test_another_process_that_writes_turns_nothing_off(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**7, 60, clock)
    await store.start()
    put(store, 1)
    await written(store)
    assert store._writing is not None
    store._writing.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    put(store, 2)
    await written(store)
    assert await store.get(key(1)) == entry(1)
    other.execute("ROLLBACK")
    other.close()
    put(store, 3)
    await written(store)
    assert await store.get(key(2)) is None
    assert await store.get(key(3)) == entry(3)
    assert (store.off_reason, store.kept().entries) == (None, 2)
    await store.close()


async def test_what_is_rolled_back_does_not_count(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    put(store, 1)
    await written(store)
    before = store.kept()
    assert store._writing is not None
    with pytest.raises(RuntimeError), store._transaction(store._writing):
        store._make_room(store._writing, 0)
        assert store.kept().entries == 0
        raise RuntimeError
    assert store.kept() == before
    assert await store.get(key(1)) == entry(1)
    await store.close()


async def test_the_database_of_another_program_is_left_alone(path: Path, clock: Clock) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE entries (key TEXT)")
        connection.execute("INSERT INTO entries VALUES ('theirs')")
    connection.close()
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    assert store.off_reason == "it is another program's database"
    put(store, 1)
    assert await store.get(key(1)) is None
    await store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT * FROM entries").fetchall() == [("theirs",)]
    connection.close()


async def test_a_file_of_another_version_is_emptied(path: Path, clock: Clock) -> None:
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    put(store, 1)
    await written(store)
    await store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.close()
    store = SqliteStore(path, 10**6, 60, clock)
    await store.start()
    assert (store.off_reason, store.kept().entries) == (None, 0)
    await store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from server.response_cache.sqlite_store import SqliteStore
from tests.server.response_cache.test_sqlite_store import put

async def main():
    store = SqliteStore(Path(sys.argv[1]), 2 * 10**6, 60)
    await store.start()
    number = 0
    while True:
        put(store, number, 20_000)
        number += 1
        if number % 20 == 0:
            print(number, flush=True)
        await asyncio.sleep(0)

asyncio.run(main())
"""


def kill_a_writer(path: Path) -> None:
    """Let a process write, and kill it in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        while int(process.stdout.readline() or "0") < 400:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_kill_in_the_middle_damages_nothing(path: Path) -> None:
    await asyncio.to_thread(kill_a_writer, path)
    store = SqliteStore(path, 10**7, 60)
    await store.start()
    assert store.off_reason is None
    connection = sqlite3.connect(path)
    keys = [row[0] for row in connection.execute("SELECT key FROM entries")]
    connection.close()
    assert len(keys) == store.kept().entries > 0
    for each in keys:
        assert await store.get(each) == entry(int.from_bytes(each), 20_000)
    await store.close()
