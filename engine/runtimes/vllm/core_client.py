"""vLLM's client of an engine core that lives in this process.

vLLM starts an engine core in a child process and talks to it over ZeroMQ. Here the core is an
ordinary object. `CoreClient` stands in for vLLM's own client: its methods are those that `AsyncLLM`
calls.

Importing this module imports vLLM.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from engine.process.gate import GATE
from engine.runtimes.vllm.core_thread import CoreThread
from engine.runtimes.vllm.park import KV_CACHE
from engine.runtimes.vllm.stream_pace import PACE
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError

if TYPE_CHECKING:
    from engine.runtimes.vllm.kept_prefixes import KeptPrefixes

log = logging.getLogger(__name__)


class CoreClient:
    """What `AsyncLLM` talks to in place of a core in another process."""

    engine_ranks_managed = (0,)
    dp_engines_running = False

    def __init__(
        self, thread: CoreThread, vllm_config: Any, executor_class: Any, *, log_stats: bool
    ) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.error: BaseException | None = None
        """Why the core is lost. Set on the event loop, just before `on_failure` is called."""
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called on the event loop when a step has raised and the core is lost."""
        self.parked: frozenset[str] = frozenset()
        """Blocks that are off the device, or on their way. While there is one, no step is taken."""
        self.prefixes: KeptPrefixes | None = None
        """None: the prefix cache is lost when the KV cache leaves the device."""
        self._lost = False
        self._thread = thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._calls: set[Future[Any]] = set()
        """Calls without a result, to be answered if the thread ends before it gets to them."""
        self.core: Any = EngineCore(vllm_config, executor_class, log_stats)
        thread.attach(self)

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop on which outputs are awaited. Call before the first request."""
        self._loop = loop

    # On the core thread.

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return (
            not self._lost
            and not self.parked
            and bool(self.core.scheduler.has_requests() or self.core.batch_queue)
        )

    def step(self) -> None:
        """Take one scheduling and decoding step of this core. The caller holds the gate."""
        try:
            outputs, executed = self.core.step_fn()
            self.core.post_step(model_executed=executed)
        except Exception as error:
            log.exception("a vLLM engine core failed")
            self.lose(error)
            return
        if outputs and (mine := outputs.get(0)) is not None:
            self._deliver(mine)

    def lose(self, error: BaseException) -> None:
        """Step no more. All requests and calls get an error."""
        if not self._lost:
            self._lost = True
            # First of all: a caller may ask again as soon as it gets the error, and must not be
            # given this core.
            if self._loop is None:
                self.error = error
            elif not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._tell_lost, error)
            self._deliver(EngineDeadError())
        for call in tuple(self._calls):
            with suppress(InvalidStateError):  # it has its result
                call.set_exception(EngineDeadError())

    def _deliver(self, item: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, item)

    # On the event loop.

    def _tell_lost(self, error: BaseException) -> None:
        # AsyncLLM refuses requests by the flag. The engine must know the reason before that.
        self.error = error
        self.resources.engine_dead = True
        if self.on_failure is not None:
            self.on_failure(error)

    async def get_output_async(self) -> Any:
        """The outputs of the next step.

        Raises:
            EngineDeadError: a step failed.

        """
        item = await self._outputs.get()
        PACE.observe()
        if isinstance(item, BaseException):
            raise item
        return item

    async def add_request_async(self, request: Any) -> None:
        """Queue a request. If the core refuses it, an error output answers it."""

        def add() -> None:
            if self._lost:
                return
            try:
                prepared, wave = self.core.preprocess_add_request(request)
                self.core.add_request(prepared, wave)
            except Exception:
                log.exception("vLLM could not take request %s", request.request_id)
                refused = EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                )
                self._deliver(EngineCoreOutputs(outputs=[refused]))

        if self.error is not None or not self._thread.post(add):
            raise EngineDeadError

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Drop requests and free their KV cache before the next step."""

        def abort() -> None:
            if not self._lost and self.core is not None:
                self.core.abort_requests(request_ids)

        self._thread.post(abort)

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Run `function(core)` on the core thread.

        Raises:
            Exception: through the future: what the function raised, or EngineDeadError if the
                thread has ended or does so first.

        """
        result: Future[Any] = Future()
        self._calls.add(result)
        result.add_done_callback(self._calls.discard)

        def job() -> None:
            if not result.set_running_or_notify_cancel():
                return  # whoever asked is gone
            try:
                result.set_result(function(self.core))
            except Exception as error:
                result.set_exception(error)

        if not self._thread.post(job):
            result.set_exception(EngineDeadError())
        return result

    def set_aside(self, blocks: Collection[str]) -> Future[None]:
        """Take no step from now on, so that these blocks can leave the device.

        Raises:
            RuntimeError: through the future. Requests are running; nothing was changed.

        """

        def finish(core: Any) -> None:
            if core.scheduler.has_unfinished_requests():
                raise RuntimeError("a model was to be parked with requests in its core")
            while self.has_work():  # ended and aborted requests are still to be cleared away
                with GATE.step():
                    self.step()
            if KV_CACHE in blocks:
                if self.prefixes is not None:
                    self.prefixes.note(core.scheduler.kv_cache_manager.block_pool)
                if not core.reset_prefix_cache():
                    raise RuntimeError("blocks of the KV cache are in use without a request")
            self.parked |= frozenset(blocks)

        return self.call(finish)

    def take_back(self, blocks: Collection[str]) -> Future[None]:
        """Step again, unless other blocks are still off the device."""

        def step_again(core: Any) -> None:
            if KV_CACHE in blocks and self.prefixes is not None:
                self.prefixes.register(core.scheduler.kv_cache_manager.block_pool)
            self.parked -= frozenset(blocks)

        return self.call(step_again)

    def __getattr__(self, name: str) -> Any:
        """`reset_prefix_cache_async` and the like: the core's method, run on the core thread."""
        if not name.endswith("_async"):
            raise AttributeError(name)
        method = name.removesuffix("_async")

        async def utility(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.wrap_future(
                self.call(lambda core: getattr(core, method)(*args, **kwargs))
            )

        return utility

    # On the loading thread.

    def shutdown(self, timeout: float | None = None) -> None:  # noqa: ARG002 - vLLM's signature
        """Stop stepping and give back what the core holds. Called by `AsyncLLM.shutdown`."""
        if self.core is None:
            return
        self._thread.detach(self)  # the step under way still needs the core
        self.error = self.error or EngineDeadError()
        core, self.core = self.core, None
        core.shutdown()
