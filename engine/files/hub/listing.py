"""What a repository of the hub holds at one commit: its files, and its small JSON documents.

A local folder is looked at in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import LoadFailed, reason
from engine.files.hub.client import headers
from engine.files.hub.errors import plain_errors
from engine.files.hub.selection import GGUF, PICKLES, WEIGHTS, HubSource, choose, has_only_gguf

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder

MAIN = "main"
"""The revision where none is named."""

MAX_TEXT_BYTES = 16 * 2**20
"""Limit of a document that is read to recognise a repository. `tokenizer.json` is not read."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    path: str
    nbytes: int
    etag: str
    """SHA-256 of a large file, git's SHA-1 of a small one; the name of its blob in the cache."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of a repository at one commit."""

    repo: str
    """`owner/name`, or the path of a folder."""
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path | None = None
    """The folder, if it is a local one."""

    def choose(self, source: HubSource) -> tuple[RemoteFile, ...]:
        """The files that `source` wants, each set of weights once.

        Raises:
            LoadFailed: no weights among them.

        """
        by_path = {file.path: file for file in self.files}
        chosen = choose(by_path, source.patterns)
        if not any(path.endswith(WEIGHTS) for path in chosen) and source.allow_pickle:
            chosen = choose(by_path, (*source.patterns, *PICKLES))
        if has_only_gguf(by_path):
            raise LoadFailed(f"{self.repo} holds only GGUF weights. {GGUF}")
        if not any(path.endswith(WEIGHTS) for path in chosen):
            pickled = any(fnmatchcase(path, each) for path in by_path for each in PICKLES)
            raise LoadFailed(
                f"{self.repo} has no weights that could be used here"
                f" ({', '.join(source.patterns)}); "
                + (
                    "its own are pickled, and a pickle can hold code"
                    if pickled
                    else "is it another kind of model?"
                )
            )
        return tuple(by_path[path] for path in chosen)


def list_repo(repo: str, revision: str | None = None) -> Listing:
    """Ask the hub what a repository holds.

    Raises:
        NotFound: there is no such repository or revision.
        LoadFailed: the hub does not answer, or refuses.

    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    with plain_errors(repo):
        commit = api.model_info(repo, revision=revision or MAIN, timeout=10).sha
        if commit is None:
            raise LoadFailed(f"the hub names no commit of {repo}")
        tree: Iterable[RepoFile | RepoFolder] = api.list_repo_tree(
            repo, recursive=True, revision=commit
        )
        files = tuple(
            RemoteFile(
                each.path,
                each.lfs.size if each.lfs else each.size,
                each.lfs.sha256 if each.lfs else each.blob_id,
            )
            for each in tree
            if isinstance(each, RepoFile)
        )
    return Listing(repo, revision or MAIN, commit, files)


def list_folder(folder: Path) -> Listing:
    """List what a local folder holds, as if it were a repository.

    Raises:
        LoadFailed: there is no such folder, or it cannot be read.

    """
    try:
        folder = folder.resolve(strict=True)
        files = tuple(
            RemoteFile(str(path.relative_to(folder)), path.stat().st_size, "")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )
    except OSError as error:
        raise LoadFailed(f"the folder {folder} cannot be read: {reason(error)}") from error
    if not folder.is_dir():
        raise LoadFailed(f"{folder} is a file; name the folder that it is in")
    return Listing(str(folder), MAIN, "", files, folder)


def read_json(listing: Listing, path: str) -> Any:
    """A JSON document of the repository, read without keeping it.

    Raises:
        LoadFailed: it is too long, or not JSON, or the hub does not give it.

    """
    try:
        return json.loads(read_text(listing, path))
    except ValueError as error:
        raise LoadFailed(f"{listing.repo}: {path} is no JSON: {error}") from error


def read_text(listing: Listing, path: str) -> str:
    """A text of the repository, read without keeping it.

    Raises:
        LoadFailed: it is too long, or the hub does not give it.

    """
    size = next((file.nbytes for file in listing.files if file.path == path), None)
    if size is None or size > MAX_TEXT_BYTES:
        raise LoadFailed(f"{listing.repo}: {path} is missing or too long to be read")
    return _read(listing, path).decode(errors="replace")


def _read(listing: Listing, path: str) -> bytes:
    if listing.folder is not None:
        try:
            return (listing.folder / path).read_bytes()
        except OSError as error:
            raise LoadFailed(f"{listing.repo}: {path}: {reason(error)}") from error
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

    with plain_errors(listing.repo):
        answer = get_session().get(
            hf_hub_url(listing.repo, path, revision=listing.commit), headers=headers()
        )
        hf_raise_for_status(answer)
    return bytes(answer.content)
