"""Where a model's files are: a local folder, a starter model, or a hub repository."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError, EngineError, LoadFailed
from engine.files.hub.cache import present, snapshot
from engine.files.hub.fetch import fetch
from engine.files.hub.selection import HubSource
from engine.starters.registry import ensure_starter, starter_folder

log = logging.getLogger(__name__)

STARTER_PREFIX = "starter:"

WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What is fetched from a hub: never pickled weights, never code."""


def local_folder(
    source: str,
    cache_dir: Path,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = WANTED_FILES,
) -> Path:
    """The folder with the files of `source`, built or downloaded if need be. May take minutes.

    What is here already is taken as it is: no hub is asked whether there is something newer.

    `patterns` are the files to fetch from a hub; paths count, and `*` matches a slash.

    Raises:
        LoadFailed: there is no such folder or starter model, or the hub could not be asked.

    """
    if source.startswith(STARTER_PREFIX):
        try:
            return ensure_starter(source.removeprefix(STARTER_PREFIX), cache_dir)
        except ConfigError as error:
            raise LoadFailed(error.message) from error
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")):
        raise LoadFailed(f"there is no folder {source}")
    wanted = HubSource(source, tuple(patterns), revision)
    found = present(wanted)
    if found is None:
        try:
            found = fetch(wanted)
        except EngineError as error:
            found = snapshot(source, revision)
            if found is None:
                raise LoadFailed(f"cannot fetch {source}: {error.message}") from error
            log.warning("using what is here of %s: %s", source, error.message)
    with suppress(OSError):
        os.utime(found)  # when it was used last, for `roundhouse prune`
    return found


def present_folder(source: str, cache_dir: Path, *, revision: str | None = None) -> Path | None:
    """The folder with the files of `source` if they are here already. Quick; fetches nothing."""
    if source.startswith(STARTER_PREFIX):
        folder = starter_folder(source.removeprefix(STARTER_PREFIX), cache_dir)
    else:
        folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((STARTER_PREFIX, "/", ".", "~")):
        return None
    return snapshot(source, revision)
