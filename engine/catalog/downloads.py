"""Fetching the files of configured models from the hub, ahead of their first request."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import ModelConfig
from engine.files.hub.cache import check_room
from engine.files.hub.fetch import Fetch, FetchProgress, OnProgress
from engine.files.hub.selection import HubSource
from engine.files.source import Source
from engine.model_folder import is_built_here
from engine.runtimes.registry import runtime_class

NO_PROGRESS = FetchProgress("", 0, 0, 0, 0)


def sources_of(model: ModelConfig, *, allow_pickle: bool = False) -> tuple[HubSource, ...]:
    """The repositories that a model is made of, its own first; none for a local one.

    Weights that a runtime only has pickled, and reads as tensors, need no `allow_pickle`.
    """
    sources = of_a_hub(runtime_class(model.runtime).hub_sources(model))
    return tuple(replace(source, allow_pickle=allow_pickle) for source in sources)


def built_sources_of(model: ModelConfig) -> tuple[str, ...]:
    """The sources of a model that are built on this machine: samples and starters."""
    sources = runtime_class(model.runtime).hub_sources(model)
    return tuple(source.repo for source in sources if is_built_here(source.repo))


def of_a_hub(sources: Sequence[HubSource]) -> tuple[HubSource, ...]:
    """Those that are repositories, and no local folders."""
    return tuple(source for source in sources if Source(source.repo).is_repo)


def pull(
    sources: Sequence[HubSource], on_progress: OnProgress, cancelled: threading.Event
) -> tuple[Path, ...]:
    """Fetch repositories one after the other. The progress is that of all of them together.

    Returns the folders of their snapshots.

    Raises:
        NotFound: there is no such repository or revision.
        LoadFailed: see `engine.files.hub.fetch.Fetch`; or all together do not fit the disk.
        FetchCancelledError: `cancelled` was set.

    """
    fetches = [Fetch(source) for source in sources]
    check_room(
        sum(fetch.missing_bytes for fetch in fetches),
        " and ".join(source.repo for source in sources),
    )
    total = FetchProgress(
        "", 0, sum(fetch.total_bytes for fetch in fetches), 0, sum(each.files for each in fetches)
    )
    folders = []
    for fetch in fetches:
        before = total

        def tell(now: FetchProgress, before: FetchProgress = before) -> None:
            on_progress(_after(before, now))

        folders.append(fetch.run(tell, cancelled))
        total = replace(
            total,
            done_bytes=total.done_bytes + fetch.total_bytes,
            files_done=total.files_done + fetch.files,
        )
    return tuple(folders)


def _after(before: FetchProgress, now: FetchProgress) -> FetchProgress:
    return replace(
        before,
        repo=now.repo,
        done_bytes=before.done_bytes + now.done_bytes,
        files_done=before.files_done + now.files_done,
    )
