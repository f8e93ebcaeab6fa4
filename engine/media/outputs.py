"""The folder of finished files, with a limit on its bytes and on their age."""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import NoSpaceLeft, NotFound
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
        """Held for moments only, never while the folder is listed."""
        self._held: set[str] = set()
        self._listing = threading.Lock()
        """Held while the folder is listed, which only `prune` does."""
        self._index: _Index | None = None
        """What is in the folder; None before it was listed."""
        self._added: list[tuple[str, int, float]] | None = None
        """Name, bytes and time of what was added since a listing began; None outside of one."""

    def put(self, data: bytes, suffix: str) -> str:
        """Keep `data` under a new name that cannot be guessed, and return the name.

        `suffix` is a file extension with its dot: `.png`.

        Raises:
            ValueError: the suffix is not an extension of one to eight small letters and digits.
            NoSpaceLeft: the disk is full.
            OSError: it cannot be written.

        """
        name = secrets.token_urlsafe(TOKEN_BYTES) + suffix
        if not _GIVEN_NAME.fullmatch(name):
            raise ValueError(f"not a file extension: {suffix!r}")

        def write(path: Path) -> None:
            path.write_bytes(data)

        with self.held(name.removesuffix(suffix)):
            self.add(name, write, sweep=False)  # a new name has no leftovers to look for
            self._make_room(self._clock())
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

    def add(self, name: str, write: Callable[[Path], None], *, sweep: bool = True) -> None:
        """Keep the file that `write` writes to a given path, whole and on disk, or not at all.

        It replaces a file of the same name. `sweep` removes what a killed process left of it, for
        which it lists the folder.

        Raises:
            NoSpaceLeft: the disk is full.
            OSError: it cannot be written.

        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with new_file(self._folder / name, sweep=sweep) as unfinished:
                write(unfinished)
                now = self._clock()
                os.utime(unfinished, (now, now))  # ages are measured by our clock
                nbytes = unfinished.stat().st_size
        except OSError as error:
            if (full := NoSpaceLeft.of(error, "the result")) is not None:
                raise full from error
            raise
        with self._lock:
            if self._index is not None:
                self._index.note(name, nbytes, now)
            if self._added is not None:
                self._added.append((name, nbytes, now))

    def find(self, name: str) -> Path | None:
        """The file that was added under this name, unless it was pruned. For trusted names only."""
        path = self._folder / name
        return path if path.is_file() else None

    def remove(self, stem: str) -> None:
        """Delete the files that belong to `stem`, if there are any. For trusted names only."""
        for path in self._folder.glob(f"{stem}.*"):
            path.unlink(missing_ok=True)
        with self._lock:
            if self._index is not None:
                self._index.drop(stem)

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
        """List the folder, and delete files beyond the limits as `put` does.

        `now` is in unix seconds. A file that cannot be deleted is logged and stays, and so is a
        folder that cannot be listed.
        """
        with self._listing:
            added: list[tuple[str, int, float]] = []
            with self._lock:
                self._added = added
            try:
                index = self._list()
            except OSError as error:
                log.warning("cannot list the outputs: %s", error)
                with self._lock:
                    self._added = None
                return
            with self._lock:
                for name, nbytes, made_at in added:
                    index.note(name, nbytes, made_at)
                self._added = None
                self._index = index
        self._make_room(now)

    def _list(self) -> _Index:
        files: list[tuple[float, str, int]] = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    files.append((stat.st_mtime, entry.name, stat.st_size))
        index = _Index()
        for made_at, name, nbytes in sorted(files):
            index.note(name, nbytes, made_at)
        return index

    def _make_room(self, now: float) -> None:
        """Delete what is older than the limit, then the oldest until the rest fits.

        Without a listing of the folder, unless there was none yet: it may hold 100,000 files.
        """
        index = self._index
        if index is None:
            self.prune(now)
            return
        removed: set[str] = set()
        with self._lock:
            while (stem := index.oldest(self._held)) is not None:
                group = index.groups[stem]
                if group.made_at > now - self.max_age_s and index.nbytes <= self.max_bytes:
                    break
                try:
                    for name in group.files:
                        (self._folder / name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("cannot delete an old output: %s", error)
                    break  # until the folder is listed again
                index.drop(stem)
                removed.add(stem)
        if removed:
            self.on_removed(frozenset(removed))


@dataclass(slots=True)
class _Group:
    """The files that belong together, by their names, with the bytes of each."""

    made_at: float
    """Of the newest file. So a video that is being written keeps its thumbnail."""
    files: dict[str, int] = field(default_factory=dict)


class _Index:
    """The files of the folder in groups, the oldest first."""

    def __init__(self) -> None:
        self.groups: dict[str, _Group] = {}
        self.nbytes = 0

    def note(self, name: str, nbytes: int, made_at: float) -> None:
        """Add a file. Its group is the newest from now on."""
        stem = name.partition(".")[0]
        group = self.groups.pop(stem, None) or _Group(made_at)
        group.made_at = max(group.made_at, made_at)
        self.nbytes += nbytes - group.files.get(name, 0)
        group.files[name] = nbytes
        self.groups[stem] = group

    def drop(self, stem: str) -> None:
        """Forget a group, if it is there."""
        group = self.groups.pop(stem, None)
        if group is not None:
            self.nbytes -= sum(group.files.values())

    def oldest(self, but: Container[str]) -> str | None:
        """The stem of the oldest group that is not in `but`."""
        return next((stem for stem in self.groups if stem not in but), None)


def _ignore(stems: frozenset[str]) -> None:
    """By default nothing listens."""
