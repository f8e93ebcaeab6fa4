"""The folder of finished files, with a limit on its bytes and on their age."""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import NotFound
from engine.files.atomic import new_file

log = logging.getLogger(__name__)

FOLDER = "outputs"
"""Under `data_dir`."""

TOKEN_BYTES = 32
"""Randomness in a name made by `put`. Knowing the name is the permission to read the file."""

_GIVEN_NAME = re.compile(r"[A-Za-z0-9_-]{43}\.[a-z0-9]{1,8}")  # 43 characters hold 32 bytes


class Outputs:
    """Finished files; the oldest leave first.

    Threads may share it. Every method blocks on the disk.

    Files with the same name up to the first dot belong together, such as a video and its thumbnail.
    They leave together.
    """

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives unix seconds. Touches no disk."""
        self.max_bytes = config.max_data
        self.max_age_s = config.max_data_age
        self.on_removed: Callable[[frozenset[str]], None] = _ignore
        """Called with the stems of the files that `prune` deleted, on the thread of that call."""
        self._folder = config.data_dir / FOLDER
        self._clock = clock
        self._lock = threading.Lock()
        self._held: set[str] = set()

    def put(self, data: bytes, suffix: str) -> str:
        """Keep `data` under a new name that cannot be guessed, and return the name.

        `suffix` is a file extension with its dot: `.png`.

        Raises:
            ValueError: the suffix is not an extension of one to eight small letters and digits.
            OSError: the disk is full or cannot be written.

        """
        name = secrets.token_urlsafe(TOKEN_BYTES) + suffix
        if not _GIVEN_NAME.fullmatch(name):
            raise ValueError(f"not a file extension: {suffix!r}")

        def write(path: Path) -> None:
            path.write_bytes(data)

        with self.held(name.removesuffix(suffix)):
            self.add(name, write)
            self.prune(self._clock())
        return name

    def path(self, name: str) -> Path:
        """The file with this name, which `put` made.

        Raises:
            NotFound: `put` made no such name, or the file has expired.

        """
        if _GIVEN_NAME.fullmatch(name):
            path = self._folder / name
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > self._clock() - self.max_age_s:
                    return path
        raise NotFound("There is no such file, or it has expired.")

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep the file that `write` writes to a given path, whole and on disk, or not at all.

        It replaces a file of the same name.

        Raises:
            OSError: the disk is full or cannot be written.

        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(self._folder / name) as unfinished:
            write(unfinished)
            now = self._clock()
            os.utime(unfinished, (now, now))  # ages are measured by our clock

    def find(self, name: str) -> Path | None:
        """The file that was added under this name, unless it was pruned. For trusted names only."""
        path = self._folder / name
        return path if path.is_file() else None

    def remove(self, stem: str) -> None:
        """Delete the files that belong to `stem`, if there are any. For trusted names only."""
        for path in self._folder.glob(f"{stem}.*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self, stem: str) -> Iterator[None]:
        """Keep the files that belong to `stem` from being pruned inside the context."""
        with self._lock:
            self._held.add(stem)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(stem)

    def prune(self, now: float) -> None:
        """Delete files older than the limit, then the oldest until the rest fits.

        `now` is in unix seconds. A file that cannot be deleted is logged and stays.
        """
        removed: set[str] = set()
        with self._lock:
            groups: dict[str, list[tuple[Path, os.stat_result]]] = defaultdict(list)
            for path in self._folder.glob("*"):
                with suppress(FileNotFoundError):
                    groups[path.name.partition(".")[0]].append((path, path.stat()))
            nbytes = sum(stat.st_size for files in groups.values() for _, stat in files)
            # A group is as old as its newest file, so a video being written keeps its thumbnail.
            made_at = {
                stem: max(stat.st_mtime for _, stat in files) for stem, files in groups.items()
            }
            for stem in sorted(groups, key=lambda stem: made_at[stem]):
                if made_at[stem] > now - self.max_age_s and nbytes <= self.max_bytes:
                    break
                if stem in self._held:
                    continue
                try:
                    for path, stat in groups[stem]:
                        path.unlink(missing_ok=True)
                        nbytes -= stat.st_size
                except OSError as error:
                    log.warning("cannot delete an old output: %s", error)
                else:
                    removed.add(stem)
        if removed:
            self.on_removed(frozenset(removed))


def _ignore(stems: frozenset[str]) -> None:
    """By default nothing listens."""
