"""Where a model's files are: a local folder, a model built here, or a hub repository."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import ConfigError, LoadFailed
from engine.files.hub.cache import snapshot
from engine.files.hub.selection import GGUF, has_only_gguf
from engine.files.source import SAMPLES, STARTER, Source
from engine.samples.registry import ensure_sample, sample_folder
from engine.starters.registry import ensure_starter, starter_folder

log = logging.getLogger(__name__)

WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""The files to fetch from a hub: never pickled weights, never code. Paths count, and `*` matches a
slash."""


@dataclass(frozen=True, slots=True)
class Builder:
    """How the models of one scheme come to be on this disk; both take a name and the cache."""

    build: Callable[[str, Path], Path]
    """The folder, built if need be. Raises `ConfigError` for an unknown name."""
    folder: Callable[[str, Path], Path]
    """The folder, whether it is there or not."""


BUILDERS: Mapping[str, Builder] = {
    SAMPLES: Builder(ensure_sample, sample_folder),
    STARTER: Builder(ensure_starter, starter_folder),
}
"""The sources `SCHEME:NAME` by their scheme."""


def is_built_here(source: str) -> bool:
    """Whether the files of `source` are built on this machine."""
    return Source(source).scheme in BUILDERS


def local_folder(source: str, cache_dir: Path, *, revision: str | None = None) -> Path:
    """The folder with the files of `source`, built if need be. May take some seconds.

    Fetches nothing from a hub: `engine.catalog.fetcher` has done that before.

    Raises:
        LoadFailed: there is no such folder or built model, or nothing of the repository is here.

    """
    named = Source(source)
    if (builder := BUILDERS.get(named.scheme or "")) is not None:
        try:
            return builder.build(named.name, cache_dir)
        except ConfigError as error:
            raise LoadFailed(error.message) from error
    folder = named.folder
    if folder.is_dir():
        if has_only_gguf(path.name for path in folder.iterdir()):
            raise LoadFailed(f"the folder {folder.name} holds only GGUF weights. {GGUF}")
        return folder
    if folder.is_absolute() or named.is_path:
        # The whole path is for the log: clients need not know the folders of this machine.
        log.error("there is no folder %s", folder)
        raise LoadFailed(f"there is no folder {folder.name} where the model's source says")
    found = snapshot(source, revision)
    if found is None:
        raise LoadFailed(f"nothing of {source} is on this disk")
    with suppress(OSError):
        os.utime(found)  # the time of the last use, for `roundhouse prune`
    return found


def present_folder(source: str, cache_dir: Path, *, revision: str | None = None) -> Path | None:
    """The folder with the files of `source` if they are here already. Quick; fetches nothing."""
    named = Source(source)
    builder = BUILDERS.get(named.scheme or "")
    folder = named.folder if builder is None else builder.folder(named.name, cache_dir)
    if folder.is_dir():
        return folder
    if builder is not None or named.is_path:
        return None
    return snapshot(source, revision)


FoundT = TypeVar("FoundT")

Status = tuple[int, int, int]
"""Inode, size and modification time of a file."""

Stamp = tuple[Path, tuple[Status | None, ...]]
"""A folder, and the status of each watched name in it; None where it is missing."""


class PresentFolders(Generic[FoundT]):
    """What was read of the present folders of models; read again once a folder has changed.

    A request is checked against the files of its model, which may be deleted or fetched at any
    time. Looking costs some microseconds, reading may cost milliseconds. Threads may share it.
    """

    def __init__(
        self, cache_dir: Path, read: Callable[[Path], FoundT], watched: Sequence[str]
    ) -> None:
        """`read` reads a folder; `watched` are the files and folders in it that it reads."""
        self._cache_dir = cache_dir
        self._read = read
        self._watched = tuple(watched)
        self._found: dict[tuple[str, str | None], tuple[Stamp, FoundT]] = {}

    def get(self, source: str, revision: str | None = None) -> FoundT | None:
        """What the folder of `source` holds now; None if it is not here.

        Raises:
            Exception: what `read` raised. Nothing is remembered then.

        """
        folder = present_folder(source, self._cache_dir, revision=revision)
        if folder is None:
            self._found.pop((source, revision), None)
            return None
        stamp = self._stamp(folder)
        known = self._found.get((source, revision))
        if known is not None and known[0] == stamp:
            return known[1]
        found = self._read(folder)
        # The stamp is older than what was read: a change in between is noticed the next time.
        self._found[source, revision] = (stamp, found)
        return found

    def _stamp(self, folder: Path) -> Stamp:
        # Not that of the folder itself: every load of the model sets its time.
        return folder, tuple(_status(folder / name) for name in self._watched)


def _status(path: Path) -> Status | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
