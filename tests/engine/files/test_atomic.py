"""Files and folders are whole or not there, whatever becomes of their writer."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.files import atomic
from engine.files.atomic import new_file, new_folder, remove_folder, remove_leftovers

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that were synced to the disk, in order."""
    paths: list[Path] = []
    monkeypatch.setattr(atomic, "sync", paths.append)
    return paths


def write(path: Path, text: str, *, overwrite: bool = True, mode: int | None = None) -> None:
    with new_file(path, overwrite=overwrite, mode=mode) as unfinished:
        unfinished.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@contextmanager
def killed_writer(target: Path, kind: str) -> Iterator[Path]:
    """The unfinished path of a process that writes until the block ends, and is then killed."""
    code = (
        "import sys, pathlib; from engine.files import atomic\n"
        "with getattr(atomic, sys.argv[1])(pathlib.Path(sys.argv[2])) as unfinished:\n"
        "    file = unfinished / 'file' if unfinished.is_dir() else unfinished\n"
        "    file.write_text('half'); print(unfinished, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, kind, str(target)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.kill()


class TestNewFile:
    def test_it_is_not_there_before_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with new_file(path) as unfinished:
            unfinished.write_text("half")
            assert not path.exists()
        assert path.read_text() == "half"
        assert names(tmp_path) == ["file"]

    def test_it_replaces_another_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write(path, "old")
        with new_file(path) as unfinished:
            unfinished.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert names(tmp_path) == ["file"]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, FileNotFoundError])
    def test_an_error_half_way_leaves_what_was_there(
        self, error: type[BaseException], tmp_path: Path
    ) -> None:
        path = tmp_path / "file"
        write(path, "old")
        with pytest.raises(error), new_file(path) as unfinished:
            unfinished.write_text("half")
            raise error
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file"]

    def test_an_error_in_replacing_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").mkdir()
        with pytest.raises(IsADirectoryError):
            write(tmp_path / "file", "new")
        assert names(tmp_path) == ["file"]

    def test_a_disk_that_does_not_sync_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        write(path, "old")

        def full(descriptor: int) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            write(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file"]

    def test_it_overwrites_nothing_unless_it_may(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write(path, "one", overwrite=False)
        assert path.read_text() == "one"
        with pytest.raises(FileExistsError):
            write(path, "two", overwrite=False)
        assert path.read_text() == "one"
        assert names(tmp_path) == ["file"]

    def test_of_two_that_may_not_overwrite_one_wins(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with pytest.raises(FileExistsError), new_file(path, overwrite=False) as unfinished:
            unfinished.write_text("late")
            write(path, "early", overwrite=False)
        assert path.read_text() == "early"
        assert names(tmp_path) == ["file"]

    def test_its_permissions_are_those_of_the_umask(self, tmp_path: Path) -> None:
        write(tmp_path / "file", "")
        assert mode_of(tmp_path / "file") == 0o644

    def test_a_secret_is_never_readable_to_others(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with new_file(path, mode=0o600) as unfinished:
            assert mode_of(unfinished) == 0o600
        assert mode_of(path) == 0o600

    @pytest.mark.parametrize("mode", [0o600, 0o400, 0o664])
    def test_one_that_is_replaced_hands_its_permissions_on(self, mode: int, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        path.chmod(mode)
        with new_file(path, mode=0o640) as unfinished:
            assert mode_of(unfinished) == 0o600
            unfinished.write_text("new")
        assert mode_of(path) == mode
        assert path.read_text() == "new"

    def test_it_is_on_disk_before_its_name_is(self, tmp_path: Path, synced: list[Path]) -> None:
        path = tmp_path / "file"
        with new_file(path) as unfinished:
            assert synced == []
        assert synced == [unfinished, tmp_path]

    def test_one_that_need_not_last_costs_no_sync(self, tmp_path: Path, synced: list[Path]) -> None:
        with new_file(tmp_path / "file", durable=False):
            pass
        assert synced == []
        assert names(tmp_path) == ["file"]

    def test_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write(tmp_path / "nowhere" / "file", "")


class TestNewFolder:
    def test_it_is_not_there_before_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "folder"
        with new_folder(path, mode=0o700) as unfinished:
            (unfinished / "file").write_text("one")
            assert not path.exists()
        assert (path / "file").read_text() == "one"
        assert mode_of(path) == 0o700
        assert names(tmp_path) == ["folder"]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, FileNotFoundError])
    def test_an_error_half_way_leaves_nothing(
        self, error: type[BaseException], tmp_path: Path
    ) -> None:
        with pytest.raises(error), new_folder(tmp_path / "folder") as unfinished:
            (unfinished / "file").write_text("half")
            raise error
        assert names(tmp_path) == []

    def test_it_replaces_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "folder"
        with pytest.raises(OSError, match="not empty"), new_folder(path) as late:
            (late / "file").write_text("late")
            with new_folder(path) as early:
                (early / "file").write_text("early")
        assert (path / "file").read_text() == "early"
        assert names(tmp_path) == ["folder"]

    def test_all_in_it_is_on_disk_before_its_name_is(
        self, tmp_path: Path, synced: list[Path]
    ) -> None:
        with new_folder(tmp_path / "folder") as unfinished:
            (unfinished / "inner").mkdir()
            (unfinished / "inner" / "file").touch()
            inside = {unfinished / "inner", unfinished / "inner" / "file"}
            assert synced == []
        assert set(synced[:2]) == inside
        assert synced[2:] == [unfinished, tmp_path]


class TestLeftovers:
    """A process that is killed cleans up nothing; the next writer does."""

    @pytest.mark.parametrize("kind", ["new_file", "new_folder"])
    def test_the_next_writer_removes_what_a_killed_one_left(
        self, kind: str, tmp_path: Path
    ) -> None:
        target = tmp_path / "target"
        with killed_writer(target, kind) as unfinished:
            pass
        assert unfinished.exists() and not target.exists()
        with getattr(atomic, kind)(target):
            assert not unfinished.exists()
        assert names(tmp_path) == ["target"]

    @pytest.mark.parametrize("kind", ["new_file", "new_folder"])
    def test_a_living_writer_keeps_its_own(self, kind: str, tmp_path: Path) -> None:
        target = tmp_path / "target"
        with killed_writer(target, kind) as unfinished:
            with pytest.raises(KeyError), getattr(atomic, kind)(target):
                raise KeyError
            remove_leftovers(tmp_path)
            assert names(tmp_path) == [unfinished.name]
        remove_leftovers(tmp_path)
        assert names(tmp_path) == []

    def test_only_what_is_unfinished_goes(self, tmp_path: Path) -> None:
        for name in ("file", "file.12345678.part", "other.part"):
            (tmp_path / name).touch()
        (tmp_path / "folder.part").mkdir()
        (tmp_path / "folder.part" / "file").touch()
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["file"]
        remove_leftovers(tmp_path / "nowhere")

    def test_a_writer_leaves_alone_what_it_has_not_named(self, tmp_path: Path) -> None:
        others = ["file.12345678.part", "file.mine.part", "file.part", "other.12345678.part"]
        for name in others[1:]:
            (tmp_path / name).touch()
        write(tmp_path / "file", "")
        (tmp_path / others[0]).touch()
        write(tmp_path / "fil[e]", "")
        write(tmp_path / "*", "")
        assert names(tmp_path) == ["*", "fil[e]", "file", *others]

    def test_one_that_is_taken_for_a_leftover_once_made_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked = atomic._locked
        taken: list[Path] = []

        def lock(path: Path) -> int | None:
            if not taken:
                taken.append(path)
                remove_leftovers(tmp_path)
            return locked(path)

        monkeypatch.setattr(atomic, "_locked", lock)
        write(tmp_path / "file", "whole")
        assert taken
        assert (tmp_path / "file").read_text() == "whole"
        assert names(tmp_path) == ["file"]

    def test_one_that_is_taken_for_a_leftover_once_opened_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flock = fcntl.flock
        taken: list[int] = []

        def lock(descriptor: int, operation: int) -> None:
            if operation == fcntl.LOCK_EX and not taken:
                taken.append(descriptor)
                remove_leftovers(tmp_path)
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", lock)
        with new_folder(tmp_path / "folder") as unfinished:
            (unfinished / "file").touch()
        assert taken
        assert names(tmp_path) == ["folder"]
        assert names(tmp_path / "folder") == ["file"]

    def test_many_writers_at_once_leave_one_whole_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        start = threading.Barrier(8, timeout=30)

        def many(letter: str) -> None:
            start.wait()
            for _ in range(20):
                write(path, letter * 10_000)

        threads = [threading.Thread(target=many, args=(letter,)) for letter in "abcdefgh"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        text = path.read_text()
        assert text == text[0] * 10_000
        assert names(tmp_path) == ["file"]


class TestRemoveFolder:
    def test_it_disappears_whole(self, tmp_path: Path, synced: list[Path]) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").touch()
        remove_folder(tmp_path / "folder")
        assert names(tmp_path) == []
        assert synced == [tmp_path]

    def test_a_missing_one_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            remove_folder(tmp_path / "folder")
