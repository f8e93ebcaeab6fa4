"""Fetching the files of configured models from the hub, ahead of their first request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import ModelConfig
from engine.errors import ShuttingDown
from engine.files.hub.cache import check_room
from engine.files.hub.fetch import Fetch, FetchCancelledError, FetchProgress, OnProgress
from engine.files.hub.selection import HubSource
from engine.files.source import Source
from engine.runtimes.registry import runtime_class

NO_PROGRESS = FetchProgress("", 0, 0, 0, 0)


def sources_of(model: ModelConfig, *, allow_pickle: bool = False) -> tuple[HubSource, ...]:
    """The repositories that a model is made of, its own first; none for a local one.

    Weights that a runtime only has pickled, and reads as tensors, need no `allow_pickle`.
    """
    return tuple(
        replace(source, allow_pickle=allow_pickle)
        for source in runtime_class(model.runtime).hub_sources(model)
        if Source(source.repo).is_repo
    )


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


@dataclass(slots=True)
class _Pull:
    """One pull on a thread, and its last progress."""

    task: asyncio.Task[tuple[Path, ...]]
    cancelled: threading.Event
    progress: list[FetchProgress]
    """A single item, which the thread replaces."""
    followers: int = 0


class Pulls:
    """The pulls that run in a server. All requests for the same model share one."""

    def __init__(self) -> None:
        self._pulls: dict[str, _Pull] = {}

    def is_pulling(self, model_id: str) -> bool:
        """Whether a pull of that model runs."""
        return model_id in self._pulls

    async def follow(
        self, model: ModelConfig, every_s: float
    ) -> AsyncGenerator[FetchProgress, None]:
        """Pull a model, or follow its running pull. The last progress is that of the end.

        When the last follower leaves, the pull stops. The next pull goes on from there.

        Raises:
            NotFound: there is no such repository or revision.
            LoadFailed: see `pull`.

        """
        one = self._pulls.get(model.id) or self._begin(model.id, sources_of(model))
        one.followers += 1
        try:
            while not one.task.done():
                yield one.progress[0]
                await asyncio.wait([one.task], timeout=every_s)
            try:
                one.task.result()
            except FetchCancelledError:  # by the last of the followers before
                raise ShuttingDown("The pull was stopped.", retry_after_s=1.0) from None
            yield one.progress[0]
        finally:
            one.followers -= 1
            if not one.followers:
                one.cancelled.set()
                await asyncio.wait([one.task])

    def _begin(self, model_id: str, sources: Sequence[HubSource]) -> _Pull:
        cancelled = threading.Event()
        progress = [NO_PROGRESS]

        def tell(now: FetchProgress) -> None:
            progress[0] = now

        task = asyncio.create_task(asyncio.to_thread(pull, sources, tell, cancelled))
        one = self._pulls[model_id] = _Pull(task, cancelled, progress)

        def done(task: asyncio.Task[tuple[Path, ...]]) -> None:
            del self._pulls[model_id]
            task.cancelled() or task.exception()  # looked at, whether anyone follows or not

        task.add_done_callback(done)
        return one
