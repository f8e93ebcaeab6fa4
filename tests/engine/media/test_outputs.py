"""Finished files: names that cannot be guessed or escaped, and the two limits."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import NoSpaceLeft, NotFound
from engine.media.outputs import Outputs
from tests.engine.scheduling.world import Clock, config


@pytest.fixture
def clock() -> Clock:
    return Clock(now=1_000_000.0)


def limits(data_dir: Path, max_data: int = 1000, max_data_age: float = 100.0) -> EngineConfig:
    return config(["model"], data_dir=data_dir, max_data=max_data, max_data_age=max_data_age)


@pytest.fixture
def outputs(tmp_path: Path, clock: Clock) -> Outputs:
    return Outputs(limits(tmp_path), clock=clock)


def test_what_was_put_is_found_under_its_name(outputs: Outputs) -> None:
    names = {outputs.put(b"one", ".png") for _ in range(20)}
    assert len(names) == 20
    for name in names:
        assert len(name) == 43 + len(".png")
        assert outputs.path(name).read_bytes() == b"one"


def test_only_a_given_name_is_a_name(outputs: Outputs, tmp_path: Path) -> None:
    name = outputs.put(b"one", ".png")
    folder = outputs.path(name).parent
    (tmp_path / "secret.png").write_bytes(b"secret")
    outputs.add("video_1.mp4", lambda path: _write(path, 3))
    (folder / (name + ".part")).write_bytes(b"half")
    for wrong in (
        "",
        ".",
        "..",
        "../secret.png",
        f"../outputs/{name}",
        str(folder / name),
        f"{name}/",
        f"{name}\n",
        f"{name}.part",
        name.replace(".png", ".webp"),
        "video_1.mp4",
        "a" * 5000,
        "\0",
    ):
        with pytest.raises(NotFound):
            outputs.path(wrong)


@pytest.mark.parametrize("suffix", ["", "png", "./x", ".PNG", ".tar.gz"])
def test_a_suffix_that_is_none_is_refused(outputs: Outputs, suffix: str) -> None:
    with pytest.raises(ValueError, match="extension"):
        outputs.put(b"one", suffix)


def test_the_oldest_go_first_when_the_bytes_run_out(outputs: Outputs, clock: Clock) -> None:
    removed: list[frozenset[str]] = []
    outputs.on_removed = removed.append
    names = []
    for _ in range(5):
        names.append(outputs.put(bytes(300), ".png"))
        clock.now += 1
    for gone in names[:2]:
        with pytest.raises(NotFound):
            outputs.path(gone)
    assert [outputs.path(name).stat().st_size for name in names[2:]] == [300, 300, 300]
    assert removed == [frozenset({name.removesuffix(".png")}) for name in names[:2]]


def test_what_is_too_old_is_not_found_even_before_it_is_deleted(
    outputs: Outputs, clock: Clock
) -> None:
    name = outputs.put(b"one", ".png")
    path = outputs.path(name)
    clock.now += 99.0
    outputs.prune(clock.now)
    assert outputs.path(name) == path
    clock.now += 1.0
    with pytest.raises(NotFound):
        outputs.path(name)
    assert path.exists()
    outputs.prune(clock.now)
    assert not path.exists()


def test_files_that_belong_together_leave_together(outputs: Outputs, clock: Clock) -> None:
    for name, nbytes in (("a.webp", 10), ("b.mp4", 500), ("a.mp4", 400)):
        outputs.add(name, lambda path, nbytes=nbytes: _write(path, nbytes))  # type: ignore[misc]
        clock.now += 1
    outputs.prune(clock.now)
    assert outputs.find("a.webp") and outputs.find("a.mp4") and outputs.find("b.mp4")
    outputs.put(bytes(200), ".png")
    assert not outputs.find("b.mp4")
    assert outputs.find("a.webp") and outputs.find("a.mp4")
    outputs.put(bytes(500), ".png")
    assert not outputs.find("a.webp") and not outputs.find("a.mp4")


def test_what_is_held_is_not_pruned(outputs: Outputs, clock: Clock) -> None:
    with outputs.held("job"):
        outputs.add("job.mp4", lambda path: _write(path, 5000))
        clock.now += 1000.0
        outputs.prune(clock.now)
        assert outputs.find("job.mp4")
    outputs.prune(clock.now)
    assert not outputs.find("job.mp4")


def test_a_file_is_whole_or_not_there(outputs: Outputs, tmp_path: Path) -> None:
    outputs.add("job.mp4", lambda path: _write(path, 10))

    def torn(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        outputs.add("job.mp4", torn)
    path = outputs.find("job.mp4")
    assert path is not None
    assert path.read_bytes() == bytes(10)
    assert [each.name for each in path.parent.iterdir()] == ["job.mp4"]


def test_what_a_killed_process_left_half_written_goes_in_time(
    outputs: Outputs, clock: Clock
) -> None:
    left = outputs.path(outputs.put(b"one", ".png")).parent / "video_1.mp4.part"
    _write(left, 10)
    outputs.prune(left.stat().st_mtime + 99.0)
    assert left.exists()
    outputs.prune(left.stat().st_mtime + 101.0)
    assert not left.exists()


def test_remove_takes_only_what_belongs_to_the_stem(outputs: Outputs) -> None:
    for name in ("one.mp4", "one.webp", "oneself.mp4"):
        outputs.add(name, lambda path: _write(path, 1))
    outputs.remove("one")
    assert not outputs.find("one.mp4") and not outputs.find("one.webp")
    assert outputs.find("oneself.mp4")


def test_a_folder_that_was_never_written_has_nothing_to_prune(outputs: Outputs) -> None:
    outputs.prune(0.0)
    outputs.remove("job")
    assert outputs.find("job.mp4") is None


def test_a_full_disk_is_named(outputs: Outputs) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoSpaceLeft, match="no space left for the result"):
        outputs.add("job.mp4", full)


def test_a_new_file_costs_no_look_at_all_the_others(
    outputs: Outputs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = outputs.put(bytes(600), ".png")
    clock.now += 1

    def scandir(_: Path) -> None:
        raise AssertionError("the whole folder was listed")

    monkeypatch.setattr(os, "scandir", scandir)
    second = outputs.put(bytes(600), ".png")
    assert outputs.path(second)
    with pytest.raises(NotFound):
        outputs.path(first)


def test_after_a_listing_that_failed_nothing_piles_up(
    outputs: Outputs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs.put(b"one", ".png")

    def unreadable() -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "_list", unreadable)
        outputs.prune(clock.now)
    outputs.put(b"two", ".png")
    assert outputs._added is None


def test_what_is_added_while_the_folder_is_listed_counts(
    outputs: Outputs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outputs._list

    def slow() -> Any:
        listed = real()
        outputs.add("late.mp4", lambda path: _write(path, 700))  # no lock is held meanwhile
        return listed

    outputs.add("early.mp4", lambda path: _write(path, 700))
    monkeypatch.setattr(outputs, "_list", slow)
    clock.now += 1
    outputs.prune(clock.now)
    assert outputs.find("late.mp4") and not outputs.find("early.mp4")


def test_a_folder_that_cannot_be_listed_is_no_error(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(outputs, "_list", broken)
    assert outputs.path(outputs.put(b"one", ".png")).read_bytes() == b"one"


def _write(path: Path, nbytes: int) -> None:
    path.write_bytes(bytes(nbytes))
