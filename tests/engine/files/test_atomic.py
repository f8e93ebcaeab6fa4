"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from engine.files.atomic import write_atomically


def test_a_file_and_its_folder_are_made(tmp_path: Path) -> None:
    path = tmp_path / "state" / "notes.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["notes.json"]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.json"
    write_atomically(path, b"one")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert [each.name for each in tmp_path.iterdir()] == ["notes.json"]


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    contents = [bytes([number]) * 10_000 for number in range(8)]

    def write(data: bytes) -> None:
        for _ in range(20):
            write_atomically(path, data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [each.name for each in tmp_path.iterdir()] == ["notes.json"]
