"""Both databases keep and find the same, and what is held in memory is what they have."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psycopg
import pytest

from engine.errors import ConfigError, Conflict, Overloaded
from server.vector_stores.backend import Backend, Near
from server.vector_stores.held_vectors import HeldVectors
from server.vector_stores.pgvector_backend import PgvectorBackend
from server.vector_stores.sqlite_backend import FILE_NAME, SqliteBackend

if TYPE_CHECKING:
    from server.vector_stores.backend import Vectors

DIMENSIONS = 48


def vectors(count: int, seed: int = 0) -> Vectors:
    found = np.random.default_rng(seed).standard_normal((count, DIMENSIONS)).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


@pytest.fixture(params=["sqlite", "postgres"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    found: Backend
    if request.param == "sqlite":
        found = SqliteBackend(tmp_path)
    else:
        found = PgvectorBackend(request.getfixturevalue("empty_postgres"))
    yield found
    found.close()


@pytest.fixture(params=["database", "memory"])
def searched(request: pytest.FixtureRequest, backend: Backend) -> HeldVectors:
    return HeldVectors(backend, 2**20 if request.param == "memory" else 0)


def ids(found: list[Near]) -> list[int]:
    return [near.passage for near in found]


def test_the_nearest_are_those_of_numpy(searched: HeldVectors) -> None:
    kept = vectors(700)
    for number in range(7):
        part = slice(100 * number, 100 * number + 100)
        searched.add("vs_a", number, [f"text {i}" for i in range(100)], kept[part])
    searched.add("vs_b", 99, ["of another store"], vectors(1, seed=5))
    every = searched.backend.load("vs_a")
    for query in vectors(20, seed=1):
        exact = kept @ query
        best = np.argsort(-exact)[:10]
        found = searched.nearest("vs_a", query, 10, None)
        assert ids(found) == [int(every.passages[row]) for row in best]
        assert [near.attachment for near in found] == [int(row) // 100 for row in best]
        assert np.allclose([near.score for near in found], exact[best], atol=2e-6)
        among = np.flatnonzero((np.arange(700) // 100) % 2 == 1)
        best = among[np.argsort(-exact[among])][:10]
        found = searched.nearest("vs_a", query, 10, [1, 3, 5, 1000])
        assert ids(found) == [int(every.passages[row]) for row in best]
    passages = searched.read(ids(found))
    assert all(near.attachment == passages[near.passage].attachment for near in found)


def test_what_is_removed_is_found_no_more(searched: HeldVectors) -> None:
    kept = vectors(30)
    searched.add("vs_a", 1, [f"one {i}" for i in range(10)], kept[:10])
    assert len(searched.nearest("vs_a", kept[0], 50, None)) == 10
    searched.add("vs_a", 2, [f"two {i}" for i in range(20)], kept[10:])
    assert len(searched.nearest("vs_a", kept[0], 50, None)) == 30
    assert searched.texts("vs_a", 2) == [f"two {i}" for i in range(20)]
    searched.remove("vs_a", 1)
    found = searched.nearest("vs_a", kept[0], 50, None)
    assert {near.attachment for near in found} == {2}
    assert len(found) == 20
    assert searched.texts("vs_a", 1) == []
    assert searched.backend.size("vs_a") == (20, DIMENSIONS)
    searched.drop("vs_a")
    searched.drop("vs_a")
    assert searched.nearest("vs_a", kept[0], 50, None) == []
    assert searched.backend.size("vs_a") == (0, 0)
    searched.add("vs_a", 3, ["anew"], vectors(1)[:, :7].copy())
    assert searched.backend.size("vs_a") == (1, 7)


def test_other_dimensions_are_a_clear_error(searched: HeldVectors) -> None:
    searched.add("vs_a", 1, ["text"], vectors(1))
    with pytest.raises(Conflict, match=r"48 dimensions.*7 now"):
        searched.nearest("vs_a", np.ones(7, np.float32), 5, None)
    with pytest.raises(Conflict, match=r"48 dimensions.*7 now"):
        searched.add("vs_a", 2, ["text"], np.ones((1, 7), np.float32))
    assert searched.backend.size("vs_a") == (1, DIMENSIONS)


def test_memory_is_bounded_and_the_least_used_leaves(backend: Backend) -> None:
    one = 100 * (4 * DIMENSIONS + 16)
    held = HeldVectors(backend, 2 * one)
    for store in ("a", "b", "c"):
        held.add(store, 1, ["text"] * 100, vectors(100))
        assert len(held.nearest(store, vectors(1)[0], 3, None)) == 3
        assert held.nbytes <= 2 * one
    assert list(held._held) == ["b", "c"]
    held.add("c", 2, ["text"] * 150, vectors(150, seed=3))  # too large from now on
    assert held.nbytes <= 2 * one
    assert "c" not in held._held
    assert len(held.nearest("c", vectors(1)[0], 300, None)) == 250
    assert "c" not in held._held


def test_sqlite_keeps_it_over_a_restart_and_to_itself(tmp_path: Path) -> None:
    first = SqliteBackend(tmp_path)
    first.add("vs_a", 1, ["a text"], vectors(1))
    first.close()
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    second = SqliteBackend(tmp_path)
    assert second.texts("vs_a", 1) == ["a text"]
    second.close()
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 1000)
    with pytest.raises(ConfigError, match="left as it is"):
        SqliteBackend(tmp_path)


def test_a_lost_postgres_is_an_error_without_its_password(
    empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PgvectorBackend(empty_postgres)
    backend.add("vs_a", 1, ["a\0text"], vectors(1))
    assert backend.texts("vs_a", 1) == ["atext"]
    with psycopg.connect(empty_postgres, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
    assert backend.texts("vs_a", 1) == ["atext"], "a new connection takes the place of the lost one"
    backend.close()
    backend._url = "postgresql://me:secret@127.0.0.1:1/none"
    with pytest.raises(Overloaded) as error:
        backend.texts("vs_a", 1)
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError) as refused:
        PgvectorBackend("postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(refused.value)
    assert os.environ.get("PGPASSWORD") is None
