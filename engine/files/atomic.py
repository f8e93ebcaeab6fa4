"""Files and folders that appear whole or not at all.

A writer gets a path beside the target, which becomes the target once it is complete. The writer
holds a lock on it until then, and the kernel ends the lock with the process. So a path without a
lock is the leftover of a killed process. The next writer of the same target removes it.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".part"
"""The last suffix of every path that is being written or deleted."""

_TOKEN_BYTES = 4
_TOKEN_PATTERN = "[0-9a-f]" * 2 * _TOKEN_BYTES
"""What tells the paths of several writers of one target apart, before the suffix."""


@contextmanager
def new_file(
    path: Path,
    *,
    overwrite: bool = True,
    durable: bool = True,
    mode: int | None = None,
    sweep: bool = True,
) -> Iterator[Path]:
    """An empty file to write to, which becomes `path` if the block ends without an error.

    A file that replaces another takes over its permissions. Any other has `mode`, or by default
    what the umask allows. With `durable`, the file is on disk when this returns. `sweep` removes
    leftovers of the same target first, for which it lists the folder.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false; it stays as it was.
        OSError: the disk is full or cannot be written.

    """
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode & 0o777
    first_mode = 0o666 if mode is None else 0o600
    with _beside(path, folder=False, mode=first_mode, sweep=sweep) as unfinished:
        try:
            yield unfinished
            if mode is not None:
                unfinished.chmod(mode)  # only now, as it may forbid to write
            if durable:
                sync(unfinished)
            if overwrite:
                unfinished.replace(path)
            else:
                os.link(unfinished, path)  # unlike a rename, it replaces nothing
        finally:
            unfinished.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


@contextmanager
def new_folder(path: Path, *, durable: bool = True, mode: int = 0o777) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` if the block ends without an error.

    It never replaces a folder that holds anything. The umask restricts `mode`. With `durable`,
    the folder and all in it are on disk when this returns.

    Raises:
        OSError: `path` exists, or the disk is full or cannot be written.

    """
    with _beside(path, folder=True, mode=mode) as unfinished:
        try:
            yield unfinished
            if durable:
                for each in (*unfinished.rglob("*"), unfinished):
                    sync(each)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if durable:
        sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder, which disappears whole: even a crash leaves no half of it.

    Raises:
        FileNotFoundError: there is none.
        OSError: the disk cannot be written.

    """
    gone = _new_name(path)
    path.rename(gone)
    sync(path.parent)
    shutil.rmtree(gone)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left unfinished in a folder, of targets with this name.

    `name` may be a pattern. Paths that a process is writing at this moment stay.
    """
    for path in folder.glob(f"{name}{UNFINISHED}"):
        with suppress(OSError), _open(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def sync(path: Path) -> None:
    """Return once the file or folder is on disk, so that it outlives a power cut."""
    with _open(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _beside(target: Path, *, folder: bool, mode: int, sweep: bool = True) -> Iterator[Path]:
    """A new file or folder next to the target, and a lock on it."""
    if sweep:
        remove_leftovers(target.parent, f"{glob.escape(target.name)}.{_TOKEN_PATTERN}")
    while True:
        path = _new_name(target)
        if folder:
            path.mkdir(mode)
        else:
            path.touch(mode, exist_ok=False)
        # Until it is locked, another process may take it for a leftover.
        if (descriptor := _locked(path)) is not None:
            break
    try:
        yield path
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a path, or None if the path is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks: leftovers stay there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if path.exists():
        return descriptor
    os.close(descriptor)
    return None


def _new_name(target: Path) -> Path:
    """A free name that begins with the target's: files of one stem belong together."""
    return target.with_name(f"{target.name}.{secrets.token_hex(_TOKEN_BYTES)}{UNFINISHED}")


@contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
