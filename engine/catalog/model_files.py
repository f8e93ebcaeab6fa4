"""The files of models on this disk: where they are, what they take, and their removal.

The last use of files is known from their access times, which most systems keep to the day. It is
also known from the time of the snapshot's folder, which every load sets.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.catalog.downloads import sources_of
from engine.config import EngineConfig, ModelConfig
from engine.errors import Conflict, NotFound
from engine.files.hub.cache import PARTIAL, cache_dir, present, repo_dir, snapshot
from engine.files.source import Source
from engine.model_folder import is_built_here, present_folder

MODELS_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class Files:
    """A repository in the hub's cache, a local folder, or a built starter model."""

    source: str
    """As the configuration names it."""
    path: Path | None
    """None: none of it is here."""
    nbytes: int
    """Bytes on the disk, unfinished files included."""
    unfinished_bytes: int
    """Bytes of downloads that broke off or still run."""
    present: bool
    """All wanted files are here."""
    last_used: float | None
    """Unix seconds; None: none of it is here."""
    models: tuple[str, ...]
    """The configured models that read it."""

    @property
    def is_repo(self) -> bool:
        """Whether a hub has it as well, so that it can be fetched again."""
        return Source(self.source).is_repo


def files_of(model: ModelConfig, config: EngineConfig) -> tuple[Files, ...]:
    """The files that a model reads: its own first, then those of parts from elsewhere."""
    repos = sources_of(model)
    found = []
    if not any(source.repo == model.source for source in repos):
        found.append(_local(model, config))
    for source in repos:
        folder = present(source)
        found.append(_of_repo(source.repo, folder, _readers(source.repo, config)))
    return tuple(found)


def other_repos(config: EngineConfig) -> tuple[Files, ...]:
    """The repositories in the hub's cache that no configured model reads."""
    named = {source.repo for model in config.models for source in sources_of(model)}
    folders = sorted(cache_dir().glob(f"{MODELS_PREFIX}*"))
    repos = [path.name.removeprefix(MODELS_PREFIX).replace("--", "/") for path in folders]
    return tuple(_of_repo(repo, snapshot(repo), ()) for repo in repos if repo not in named)


def unused_repos(
    config: EngineConfig, before: float, *, unconfigured: bool = False
) -> tuple[Files, ...]:
    """The repositories last used before that time (Unix seconds), the longest unused first.

    Those of pinned models are left out: they may have been loaded long ago and still be in use.
    `unconfigured` adds those that no configured model reads. Other programs may read them.
    """
    pinned = {model.id for model in config.models if model.pin}
    found = {each.source: each for model in config.models for each in files_of(model, config)}
    if unconfigured:
        found |= {each.source: each for each in other_repos(config)}
    old = [
        each
        for each in found.values()
        if each.is_repo
        and each.last_used is not None
        and each.last_used < before
        and not pinned.intersection(each.models)
    ]
    return tuple(sorted(old, key=lambda each: each.last_used or 0.0))


def removable(model: ModelConfig, config: EngineConfig) -> tuple[Files, ...]:
    """The repositories on this disk that this model alone reads.

    Raises:
        Conflict: its files are a local folder or a starter model, or other models read all of it.

    """
    every = files_of(model, config)
    repos = [each for each in every if each.is_repo]
    if not repos:
        raise Conflict(
            f"The files of {model.id!r} are no download ({model.source}); remove them yourself"
            f" ({', '.join(str(each.path) for each in every if each.path) or 'none are here'})."
        )
    here = [each for each in repos if each.path is not None]
    own = tuple(each for each in here if set(each.models) <= {model.id})
    if here and not own:
        others = sorted({name for each in here for name in each.models} - {model.id})
        raise Conflict(f"The files of {model.id!r} are those of {', '.join(others)} too.")
    return own


def remove(repo: str) -> int:
    """Delete a repository from the hub's cache, all revisions and unfinished parts; returns bytes.

    Raises:
        NotFound: it is not there.
        OSError: it could not be deleted.

    """
    from huggingface_hub import scan_cache_dir

    path = repo_dir(repo)
    if not path.is_dir():
        raise NotFound(f"Nothing of {repo} is on this disk.")
    nbytes = _blob_bytes(path)
    known = next((each for each in scan_cache_dir().repos if each.repo_path == path), None)
    if known is not None:
        commits = [revision.commit_hash for revision in known.revisions]
        # The client knows the blobs that repositories share, and leaves those of others.
        scan_cache_dir().delete_revisions(*commits).execute()
    if path.exists():  # a download without a snapshot, or files that the client left
        shutil.rmtree(path)
    return nbytes


def remove_all(found: Iterable[Files]) -> int:
    """Delete some repositories from the hub's cache; returns bytes.

    Raises:
        NotFound: one is not there.
        Conflict: one could not be deleted.

    """
    freed = 0
    for each in found:
        try:
            freed += remove(each.source)
        except OSError as error:
            raise Conflict(f"The files of {each.source} cannot be deleted: {error}") from error
    return freed


def _readers(repo: str, config: EngineConfig) -> tuple[str, ...]:
    return tuple(
        model.id
        for model in config.models
        if any(source.repo == repo for source in sources_of(model))
    )


def _of_repo(repo: str, folder: Path | None, models: Sequence[str]) -> Files:
    path = repo_dir(repo)
    if not path.is_dir():
        return Files(repo, None, 0, 0, False, None, tuple(models))
    unfinished = sum(
        stat.st_size for name, stat in _stats(path / "blobs") if name.endswith(".incomplete")
    )
    return Files(
        source=repo,
        path=folder or path,
        nbytes=_blob_bytes(path),
        unfinished_bytes=unfinished,
        present=folder is not None,
        last_used=_last_used(path / "blobs", *(path / "snapshots").glob("*")),
        models=tuple(models),
    )


def _local(model: ModelConfig, config: EngineConfig) -> Files:
    folder = present_folder(model.source, config.cache_dir)
    if folder is None:
        return Files(model.source, None, 0, 0, False, None, (model.id,))
    nbytes = sum(stat.st_size for _, stat in _stats(folder))
    readers = tuple(each.id for each in config.models if each.source == model.source)
    return Files(
        source=model.source,
        path=folder if is_built_here(model.source) else folder.resolve(),
        nbytes=nbytes,
        unfinished_bytes=0,
        present=True,
        last_used=_last_used(folder),
        models=readers,
    )


def _blob_bytes(repo_path: Path) -> int:
    return sum(stat.st_size for _, stat in _stats(repo_path / "blobs"))


def _last_used(files: Path, *folders: Path) -> float | None:
    times = [stat.st_atime for name, stat in _stats(files) if not name.endswith(PARTIAL)]
    for folder in folders:
        with suppress(OSError):
            times.append(folder.stat().st_mtime)
    if not times:  # only a part of a download
        times = [stat.st_mtime for _, stat in _stats(files)]
    return max(times, default=None)


def _stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and status of every file below a folder. Files that vanish are left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield name, (Path(parent) / name).stat()
