"""The hub client's cache on this disk: its folders, what is present in them, and its room."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from engine.errors import LoadFailed
from engine.files.hub.listing import MAIN, Listing, RemoteFile
from engine.files.hub.selection import HubSource
from engine.units import format_size

PARTIAL = ".roundhouse.incomplete"
"""Ends the name of a part; the client counts `*.incomplete` as unfinished and passes over it."""


def cache_dir() -> Path:
    """Where the client keeps repositories: `HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_dir(repo: str) -> Path:
    """The folder of a repository in the cache, whether it is there or not."""
    return cache_dir() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder with the present files of a repository, whoever fetched them. Asks no hub."""
    folder = repo_dir(repo)
    commit = revision or MAIN
    try:
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{40}", commit) is None:
            return None
    path = folder / "snapshots" / commit
    return path if path.is_dir() else None


def present(source: HubSource) -> Path | None:
    """The folder of a repository if all wanted files of it are here. Asks no hub.

    Pickled weights count: they are here, so somebody allowed them.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = snapshot(source.repo, source.revision)
    if folder is None:
        return None
    try:
        tree = get_cached_repo_tree(source.repo, revision=folder.name, cache_dir=cache_dir())
        files = tuple(RemoteFile(file.path, file.size, file.blob_id) for file in tree)
        listing = Listing(source.repo, source.revision or MAIN, folder.name, files)
        wanted = listing.choose(replace(source, allow_pickle=True))
    except (CachedRepoTreeNotFoundError, LoadFailed):
        return None
    return folder if all((folder / file.path).is_file() for file in wanted) else None


def check_room(missing_bytes: int, what: str) -> None:
    """Refuse, before the first byte, what the disk of the cache cannot hold.

    Raises:
        LoadFailed: with the bytes that are missing and those that are free.

    """
    free_bytes = free_disk_bytes(cache_dir())
    if missing_bytes > free_bytes:
        raise LoadFailed(
            f"{what} needs {format_size(missing_bytes)} more on the disk of {cache_dir()}, where"
            f" {format_size(free_bytes)} are free: make room (`roundhouse prune`), or let HF_HOME"
            " name a folder on a larger disk"
        )


def free_disk_bytes(path: Path) -> int:
    """The bytes that this user's programs may still write where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
