"""Models that come in without a request: pinned ones, and those of an earlier process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from engine.admission import Admission
from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError
from engine.requests import Priority, SchedulingOptions
from engine.runtimes.base import Runtime
from engine.scheduling.deadline import Deadline
from engine.scheduling.report import SchedulerReport
from engine.units import format_size

log = logging.getLogger(__name__)


class Preloading:
    """What an engine brings in at its start. Failures are logged and hold nothing up."""

    def __init__(
        self,
        config: EngineConfig,
        runtimes: Mapping[str, Runtime],
        admission: Admission,
        report: SchedulerReport,
        load: Callable[[str, SchedulingOptions], Awaitable[None]],
        usual_deadline: Callable[[], Deadline],
        to_restore: Sequence[str],
    ) -> None:
        """`load` brings a model in; `to_restore` are the models of an earlier process, in order."""
        self._config = config
        self._runtimes = runtimes
        self._admission = admission
        self._report = report
        self._load = load
        self._usual_deadline = usual_deadline
        self._to_restore = to_restore
        self.tasks: list[asyncio.Task[None]] = []

    async def bring_in_what_takes_no_device(self) -> None:
        """Before any request: later they would wait for the transition of another model."""
        for model in self._config.models:
            if self._runtimes[model.runtime].takes_no_device:
                try:
                    await self._admission.bring_in(
                        model, self._usual_deadline(), SchedulingOptions()
                    )
                except EngineError as error:
                    log.error("cannot bring in %s: %s", model.id, error)

    def start(self) -> None:
        """Begin to load the pinned models and those to be restored."""
        pinned = [self._pinned(model) for model in self._config.models if model.pin]
        for each in (*pinned, self._restore(), self._warn_of_too_large()):
            self.tasks.append(asyncio.create_task(each))

    def stop(self) -> None:
        """Ask for no further model."""
        for task in self.tasks:
            task.cancel()

    async def _pinned(self, model: ModelConfig) -> None:
        try:
            await self._load(model.id, SchedulingOptions())
        except EngineError as error:
            log.error("cannot load the pinned model %s: %s", model.id, error)

    async def _restore(self) -> None:
        """Load what an earlier process had. Requests go first, and no model leaves for it."""
        scheduling = SchedulingOptions(priority=Priority.BATCH, no_evict=True)
        for model_id in self._to_restore:
            try:
                await self._load(model_id, scheduling)
            except EngineError as error:  # among others: it is no longer configured
                log.warning("%s is not restored: %s", model_id, error)

    async def _warn_of_too_large(self) -> None:
        """Log the models that can never fit, before a request for one comes.

        Only models whose files are here are checked: nothing is fetched or built for it.
        """
        for model in self._config.models:
            try:
                if not await asyncio.to_thread(_has_all_files, model, self._config):
                    continue
                await self._admission.know_size(model, self._usual_deadline())
            except Exception as error:  # a library's; the first request gets it as well
                log.debug("cannot estimate what %s takes: %s", model.id, error)
                continue
            forecast = self._report.forecast(model.id)
            if not forecast.fits:
                needed = format_size(forecast.wanted_bytes or 0)
                log.warning("%s cannot be served: needs %s; %s", model.id, needed, forecast.reason)


def _has_all_files(model: ModelConfig, config: EngineConfig) -> bool:
    """Whether all that a model reads is on this disk. Asks no hub."""
    # It brings NumPy, which commands need not wait for.
    from engine.catalog.model_files import files_of

    return all(files.present for files in files_of(model, config))
