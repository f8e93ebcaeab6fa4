"""Bringing the files of models to this disk: each model's by one task, whoever asks for them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engine.catalog.downloads import NO_PROGRESS, of_a_hub, pull
from engine.config import ModelConfig
from engine.errors import Conflict, EngineError, LoadFailed, NotFound, QueueTimeout, ShuttingDown
from engine.files.hub.cache import present, snapshot
from engine.files.hub.fetch import FetchCancelledError, FetchProgress
from engine.files.hub.selection import HubSource
from engine.memory.block import Estimate
from engine.model_folder import is_built_here, local_folder, present_folder
from engine.runtimes.base import Runtime
from engine.scheduling.deadline import Deadline

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Models that are fetched at once, each over a few connections. A model whose files are here waits
for none of them."""

ResultT = TypeVar("ResultT")
AnyT = TypeVar("AnyT")


@dataclass(slots=True)
class _Fetch:
    """The running fetch of a model."""

    wanted: bool
    """Whether a request wants the files: then it goes on when nobody follows it any more."""
    task: asyncio.Task[None] = field(init=False)
    progress: FetchProgress = NO_PROGRESS
    """A thread replaces it."""
    followers: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    has_turn: bool = False

    def tell(self, now: FetchProgress) -> None:
        """Take the progress."""
        self.progress = now

    def give_up(self) -> None:
        """End soon. The task ends with its thread, so that nothing is written afterwards."""
        self.cancelled.set()
        if not self.has_turn:
            self.task.cancel()


class Fetcher:
    """The one way by which files of models come to this disk, and leave it, while an engine runs.

    It has threads of its own: a fetch may take hours, and nothing else may wait for its thread.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        runtimes: Mapping[str, Runtime],
        cache_dir: Path,
        on_changed: Callable[[ModelConfig], None],
    ) -> None:
        """`cache_dir` has the models that are built here.

        `on_changed` is told of each model of which a pull brought newer files.
        """
        self._models = models
        self._runtimes = runtimes
        self._cache_dir = cache_dir
        self._on_changed = on_changed
        self._fetches: dict[str, _Fetch] = {}
        self._readings: dict[str, asyncio.Task[Estimate]] = {}
        self._removals: dict[str, asyncio.Task[int]] = {}
        self._here: set[str] = set()
        """Models whose files were all here when somebody last looked."""
        self._turns = asyncio.Semaphore(AT_ONCE)
        # A model has one fetch, and one reading or look at its files.
        self._threads = ThreadPoolExecutor(2 * len(models), thread_name_prefix="fetch")
        self._stopped = False

    def has_files(self, model: ModelConfig) -> bool:
        """Whether all files of a model were here when somebody last looked."""
        return model.id in self._here

    def only_builds(self, model: ModelConfig) -> bool:
        """Whether all files of a model are built on this machine, so that no hub is asked."""
        return all(is_built_here(each.repo) for each in self._sources(model))

    async def look(self, model: ModelConfig) -> bool:
        """Whether all files of a model are here. Asks no hub.

        Raises:
            ShuttingDown: `stop` was called.

        """
        if model.id not in self._here and not await self._on_thread(self._missing, model):
            if model.id in self._removals:
                return False
            self._here.add(model.id)
        return model.id in self._here

    async def bring(self, model: ModelConfig, deadline: Deadline | None = None) -> None:
        """Wait until all files of a model are here; fetch what is missing.

        Files that are here are taken as they are: no hub is asked for something newer.

        Raises:
            LoadFailed: they are not to be had.
            QueueTimeout: they take longer to come. Fetching them goes on.
            ShuttingDown: `stop` was called.

        """
        while not await self.look(model):
            await self._finish_removal(model, deadline)
            running = self._fetches.get(model.id) or self._begin(model, newest=False)
            running.wanted = True
            await _finish(running.task, model, deadline)
            if running.task.cancelled() and not self._stopped:
                continue  # the last follower of a pull had just left
            try:
                _result(running.task)
            except NotFound as error:  # of a pull
                raise LoadFailed(error.message) from error

    async def bring_again(self, model: ModelConfig) -> None:
        """Look whether all files are still here, and fetch what is missing.

        Raises:
            EngineError: see `bring`.

        """
        self._here.discard(model.id)
        await self.bring(model)

    async def estimate(self, model: ModelConfig, deadline: Deadline | None = None) -> Estimate:
        """What a model will take, read from its files, which are brought first.

        Raises:
            LoadFailed: the files are not to be had, or cannot be read.
            EngineError: see `bring`.

        """
        await self.bring(model, deadline)
        reading = self._readings.get(model.id)
        if reading is None:
            estimate = self._runtimes[model.runtime].estimate
            reading = asyncio.create_task(self._on_thread(estimate, model))
            self._readings[model.id] = reading
            _forget_at_the_end(reading, self._readings, model.id)
        await _finish(reading, model, deadline)
        return _result(reading)

    async def follow(
        self, model: ModelConfig, every_s: float
    ) -> AsyncGenerator[FetchProgress, None]:
        """Fetch the newest files of a model, or follow its running fetch.

        The last progress is that of the end. When the last follower leaves, the fetch stops, unless
        a request wants the files. The next fetch goes on from there.

        Raises:
            NotFound: there is no such repository or revision.
            LoadFailed: see `engine.catalog.downloads.pull`.
            ShuttingDown: `stop` was called.

        """
        await self._finish_removal(model)
        while (running := self._fetches.get(model.id)) and running.cancelled.is_set():
            await asyncio.wait([running.task])
        running = running or self._begin(model, newest=True)
        running.followers += 1
        try:
            while not running.task.done():
                yield running.progress
                await asyncio.wait([running.task], timeout=every_s)
            _result(running.task)
            yield running.progress
        finally:
            running.followers -= 1
            if not running.followers and not running.wanted:
                running.give_up()
                await asyncio.wait([running.task])

    async def remove(self, model: ModelConfig, delete: Callable[[], int]) -> int:
        """Run `delete`, which deletes files of a model and returns their bytes, on a thread.

        A request that comes meanwhile waits for the end, and then fetches them again.

        Raises:
            Conflict: they are just being fetched, read, or removed.
            Exception: what `delete` raised.

        """
        for running in (self._fetches, self._readings, self._removals):
            if model.id in running:
                raise Conflict(f"The files of {model.id!r} are in use; try again when it is done.")
        self._here.discard(model.id)
        removal = asyncio.create_task(self._on_thread(delete))
        self._removals[model.id] = removal
        _forget_at_the_end(removal, self._removals, model.id)
        return await asyncio.shield(removal)

    def stop(self) -> None:
        """Fetch nothing any more. What has arrived is kept; whoever waits gets `ShuttingDown`."""
        self._stopped = True
        for running in self._fetches.values():
            running.cancelled.set()
            running.task.cancel()
        for reading in self._readings.values():
            reading.cancel()
        # Nobody waits for the threads: a fetch ends with its next chunk of bytes.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sources(self, model: ModelConfig) -> tuple[HubSource, ...]:
        return self._runtimes[model.runtime].hub_sources(model)

    def _missing(self, model: ModelConfig) -> tuple[HubSource, ...]:
        return tuple(each for each in self._sources(model) if not self._is_here(each))

    def _is_here(self, source: HubSource) -> bool:
        """Whether nothing can be done: a local folder that is missing will not come."""
        if is_built_here(source.repo):
            return present_folder(source.repo, self._cache_dir) is not None
        return not of_a_hub((source,)) or present(source) is not None

    def _begin(self, model: ModelConfig, *, newest: bool) -> _Fetch:
        if self._stopped:
            raise _stopped()
        running = self._fetches[model.id] = _Fetch(wanted=not newest)
        running.task = asyncio.create_task(self._fetch(model, running, newest=newest))
        _forget_at_the_end(running.task, self._fetches, model.id)
        return running

    async def _fetch(self, model: ModelConfig, running: _Fetch, *, newest: bool) -> None:
        if newest:
            wanted = self._sources(model)
        else:
            wanted = await self._on_thread(self._missing, model)
            for built in (each.repo for each in wanted if is_built_here(each.repo)):
                await self._on_thread(local_folder, built, self._cache_dir)
        sources = of_a_hub(wanted)
        if sources:
            await self._fetch_of_a_hub(sources, running, newest=newest)
        self._here.add(model.id)

    async def _fetch_of_a_hub(
        self, sources: Sequence[HubSource], running: _Fetch, *, newest: bool
    ) -> None:
        async with self._turns:
            running.has_turn = True
            before = await self._on_thread(_snapshots, sources)
            try:
                await self._on_thread(pull, sources, running.tell, running.cancelled)
            except FetchCancelledError:
                raise asyncio.CancelledError from None
            except EngineError as error:
                if newest:
                    raise
                if None in before:
                    raise LoadFailed(error.message) from error
                names = " and ".join(source.repo for source in sources)
                log.warning("using what is here of %s: %s", names, error.message)
            after = await self._on_thread(_snapshots, sources)
        changed = {
            source.repo
            for source, old, new in zip(sources, before, after, strict=True)
            if old not in (None, new)
        }
        for each in self._models.values():
            if changed & {source.repo for source in self._sources(each)}:
                self._on_changed(each)

    async def _finish_removal(self, model: ModelConfig, deadline: Deadline | None = None) -> None:
        while (removal := self._removals.get(model.id)) is not None:
            await _finish(removal, model, deadline)
            await asyncio.sleep(0)  # it leaves the mapping by a callback

    async def _on_thread(self, work: Callable[..., ResultT], *args: object) -> ResultT:
        if self._stopped:
            raise _stopped()
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopped or (task and task.cancelling()):
                raise
            raise _stopped() from None  # no thread took the work before `stop`


def _snapshots(sources: Sequence[HubSource]) -> tuple[Path | None, ...]:
    return tuple(snapshot(source.repo, source.revision) for source in sources)


async def _finish(
    task: asyncio.Task[ResultT], model: ModelConfig, deadline: Deadline | None
) -> None:
    """Wait for the end of a task, whatever that is.

    Raises:
        QueueTimeout: it comes after the deadline. The task goes on.

    """
    await asyncio.wait([task], timeout=None if deadline is None else deadline.left_s)
    if not task.done():
        message = f"The files of the model {model.id!r} are still being fetched."
        raise QueueTimeout(message, retry_after_s=10.0)


def _result(task: asyncio.Task[ResultT]) -> ResultT:
    if task.cancelled():  # only `stop` and a follower who left do that
        raise _stopped()
    return task.result()


def _stopped() -> ShuttingDown:
    return ShuttingDown("Fetching was stopped.", retry_after_s=5.0)


def _forget_at_the_end(task: asyncio.Task[ResultT], tasks: dict[str, AnyT], model_id: str) -> None:
    def done(task: asyncio.Task[ResultT]) -> None:
        del tasks[model_id]
        task.cancelled() or task.exception()  # looked at, whether anyone waits or not

    task.add_done_callback(done)
