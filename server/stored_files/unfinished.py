"""A file that is being written, beside those that are stored."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from engine.errors import NoSpaceLeft
from engine.files.atomic import UNFINISHED, sync


class Unfinished:
    """A new file that only its owner may read. Its lock says that it is no leftover.

    Either `finish` or `discard` ends it. Every method blocks on the disk.
    """

    def __init__(self, folder: Path) -> None:
        """Make it.

        Raises:
            NoSpaceLeft: the disk is full.
            OSError: it cannot be made.

        """
        self.path = folder / f"{secrets.token_hex(16)}{UNFINISHED}"
        with _FullDisk():
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.file = os.fdopen(descriptor, "w+b")
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    @property
    def nbytes(self) -> int:
        """What was written so far."""
        with _FullDisk():
            self.file.flush()
        return os.fstat(self.file.fileno()).st_size

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            NoSpaceLeft: the disk is full.

        """
        with _FullDisk():
            self.file.write(data)

    def finish(self, path: Path) -> None:
        """Become the file at `path`, whole and on disk."""
        with _FullDisk():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.path.replace(path)
            self.file.close()
            sync(path.parent)

    def discard(self) -> None:
        """Delete what was written, unless it is finished."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # what it still had to write
            self.file.close()


class _FullDisk:
    """Names a full disk."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError) and (full := NoSpaceLeft.of(error, "the file")) is not None:
            raise full from error
