"""Model folders that are built on this machine: once, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.errors import LoadFailed
from engine.files.atomic import new_folder


def ensure_built(
    folder: Path, source: str, write: Callable[[Path], None], *, durable: bool
) -> Path:
    """Return `folder`, filled by `write` if it is not there.

    Any number of threads and processes may ask at once. An interrupted build leaves no half-made
    folder. With `durable`, all of it is on disk before it gets its name. `source` is for messages.

    Raises:
        LoadFailed: the folder cannot be written, or what `write` raised.

    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, durable=durable) as building:
            write(building)
    except OSError as error:
        # The folder may be there by now: another build was first, and has written the same bytes.
        if not folder.is_dir():
            reason = error.strerror or error
            raise LoadFailed(f"cannot build {source} in {folder.parent}: {reason}") from error
    return folder
