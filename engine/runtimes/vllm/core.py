"""vLLM's engine cores inside this process, all stepped by one thread.

vLLM starts an engine core in a child process and talks to it over ZeroMQ.
Here the core is an object like any other: `CoreClient` takes the place of
vLLM's own client (what `AsyncLLM` asks of it is the set of methods below), and
`CoreThread` steps every live core in turn. One thread is needed because the
forward context of vLLM is a module global: two cores stepping on two threads
read each other's.

Importing this module imports vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import logging
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import torch
from threadpoolctl import threadpool_limits

import vllm.config.vllm as vllm_config_module
import vllm.v1.engine.core as vllm_core_module
from engine.process.gate import GATE
from engine.process.watchdog import WATCHDOG
from engine.runtimes.common.compute_thread import end_openmp_pools
from engine.runtimes.vllm.output_collector import keep_outputs_apart
from engine.runtimes.vllm.park import KV_CACHE, note_packed_layers
from engine.runtimes.vllm.request_state import pace_streams
from engine.runtimes.vllm.stream_pace import PACE
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.scale_out import factories as scale_out_factories
from vllm.entrypoints.serve.utils import fingerprint
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import registry as model_registry
from vllm.platforms import current_platform
from vllm.renderers import hf
from vllm.utils import cpu_resource_utils, func_utils
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import uniproc_executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.worker_base import WorkerWrapperBase

log = logging.getLogger(__name__)

STEP_METHODS = frozenset(
    {"execute_model", "sample_tokens", "take_draft_token_ids", "execute_dummy_batch"}
)
"""Worker methods that belong to a step; every other one may change process-wide state."""

LOAD_FORMAT = "roundhouse"

ALIVE_S = 0.2
"""How often who waits for the core thread looks whether there still is one."""


@register_model_loader(LOAD_FORMAT)
class YieldingModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader, letting other models step while the weights are read.

    Reading the files takes seconds, so between two tensors the gate is opened now and then.
    """

    def __init__(self, load_config: Any) -> None:
        # Not "auto", which falls back to pickled weights. A copy: vLLM asks for the loader again.
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

    def track_weights_loading(
        self, model: Any, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Refuse a checkpoint that leaves a plain linear or embedding layer unfilled.

        vLLM's own check passes over every layer that has a quantisation method,
        and a plain layer's method is called "unquantised": the model would answer
        from whatever the memory held.
        """
        if loaded_weights is not None and not quantized:
            missing = [
                full_name
                for name, module in model.named_modules()
                if isinstance(
                    getattr(module, "quant_method", None),
                    UnquantizedLinearMethod | UnquantizedEmbeddingMethod,
                )
                for parameter, _ in module.named_parameters(recurse=False)
                if (full_name := f"{name}.{parameter}") not in loaded_weights
            ]
            # Tied weights are one parameter under two names; vLLM names the first.
            named = {name for name, _ in model.named_parameters()}
            if missing := sorted(named.intersection(missing)):
                raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
        super().track_weights_loading(model, loaded_weights, quantized)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """Every (name, tensor) of the checkpoint."""
        for item in super().get_all_weights(model_config, model):
            GATE.breathe()
            yield item


class GatedWorker(WorkerWrapperBase):  # type: ignore[misc]
    """vLLM's worker, each stage of its construction behind the gate; steps go in between."""

    def init_worker(self, all_kwargs: Any) -> None:
        """Construct the worker."""
        with GATE.exclusive():
            super().init_worker(all_kwargs)

    def init_device(self) -> None:
        """Join the process-wide parallel groups and construct the model runner."""
        with GATE.exclusive():
            super().init_device()

    def load_model(self) -> None:
        """Build the module and fill it.

        vLLM keeps rotary embeddings for all models of the process that want the same ones:
        parking one model would take their buffers from the others.
        """
        with GATE.exclusive():
            rotary_embedding._ROPE_DICT.clear()
            self.worker.load_model()


class GatedExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's in-process executor with everything but a step behind the gate."""

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the worker; exclusively unless it is part of a step."""
        if method in STEP_METHODS:
            return super().collective_rpc(method, *args, **kwargs)
        with GATE.exclusive():
            return super().collective_rpc(method, *args, **kwargs)

    def shutdown(self) -> None:
        """Give back the worker's memory."""
        with GATE.exclusive():
            super().shutdown()


def patch_vllm() -> None:
    """Make vLLM safe for several engines in one process. Call once, before the first engine.

    Each line answers a hazard that was met by running into it:
    closing one engine tore down the parallel groups of all; every new engine
    froze the heap with the others' garbage in it; its construction, rearranging
    its layers or zeroing its KV cache held up every stream for as long as it took;
    the first load of
    an architecture imported vLLM once more in a child process just to look at
    the class (10 s); every engine wrapped the CPU kernels once more (0.2 s and
    one more call layer each time); every load read the metadata of all installed
    packages twice, asked `lscpu` twice, compiled each chat template twice more only to
    try it, and built the objects of routes that are not served here (0.1 s together).
    """
    vllm_core_module.cleanup_dist_env_and_memory = _leave_alone
    vllm_core_module.freeze_gc_heap = _leave_alone
    uniproc_executor.WorkerWrapperBase = GatedWorker
    model_registry._run_in_subprocess = _run_here
    loader_utils.device_loading_context = _breathing(loader_utils.device_loading_context)
    gpu_model_runner.allocate_kv_cache = _yielding(gpu_model_runner.allocate_kv_cache)
    entry_points: Any = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points = entry_points
    cpu_resource_utils._get_cpu_list = functools.cache(cpu_resource_utils._get_cpu_list)
    AnthropicServingMessages._detect_merge_inline_system = staticmethod(
        functools.cache(AnthropicServingMessages._detect_merge_inline_system)
    )
    scale_out_factories.init_scale_out_state = _leave_alone
    note_packed_layers()
    pace_streams()
    keep_outputs_apart()
    GATE.state.register(
        "vllm.current_config",
        lambda: vllm_config_module._current_vllm_config,
        lambda config: setattr(vllm_config_module, "_current_vllm_config", config),
    )
    platform = type(current_platform)
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if register is not None:
        platform.register_triton_kernel_overrides = _once(register)


def forget_tokenizers() -> None:
    """Drop the caches that keep the tokenizers of engines long gone alive.

    Keyed by tokenizers and their methods, they are made for a process with one
    engine; of a large vocabulary each reload would leave tens of megabytes. The
    cache by path stays: one tokenizer a model, and a reload need not parse it.
    """
    func_utils._supports_kw.cache_clear()
    hf._cached_resolve_chat_template_kwargs.cache_clear()


def serving_objects(llm: Any, arguments: Any, tasks: Any) -> Any:
    """What answers requests: vLLM's serving classes on one engine.

    Called on the loading thread: compiling the chat template would hold up every
    stream if the event loop did it. vLLM's function is a coroutine, but waits for
    nothing of that loop. It sets torch to one thread meanwhile.
    """
    serving = SimpleNamespace()
    # Else each of the objects hashes the whole configuration for it.
    arguments.fingerprint_value = fingerprint.build_system_fingerprint(llm.vllm_config)
    arguments.fingerprint_mode = "custom"
    with GATE.exclusive():
        asyncio.run(init_app_state(llm, serving, arguments, supported_tasks=tasks))
    return serving


def _leave_alone(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for what vLLM does to a process that it takes for its own."""


def _run_here(function: Callable[[], Any]) -> Any:
    return function()


def _yielding(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with GATE.yielded():
            return function(*args, **kwargs)

    return wrapper


def _breathing(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        GATE.breathe()
        return function(*args, **kwargs)

    return wrapper


def _once(function: Callable[..., None]) -> Any:
    done = False

    def wrapper(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        if not done:
            # It looks at every name of every module: at deprecated ones, and at llvmlite's library
            # object, which answers to any attribute with a function and breaks the search.
            hidden = {name: sys.modules[name] for name in sys.modules if "llvmlite" in name}
            for name in hidden:
                del sys.modules[name]
            try:
                with warnings.catch_warnings(action="ignore"):
                    function(*args, **kwargs)
            finally:
                sys.modules.update(hidden)
            done = True

    return staticmethod(wrapper)


class CoreThread:
    """The one thread that steps every engine core."""

    def __init__(self, omp_threads: int | None = None) -> None:
        """Steps compute with `omp_threads` OpenMP threads; None leaves it to the libraries."""
        self._omp_threads = omp_threads
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: list[CoreClient] = []
        self._thread = threading.Thread(target=self._run, name="vllm-cores", daemon=True)
        self._thread.start()

    @property
    def waits_at_gate(self) -> bool:
        """Whether the thread is kept waiting by somebody's exclusive work."""
        return GATE.waits(self._thread.ident or 0)

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` on the thread between two steps, in the order posted."""
        self._inbox.put(job)

    def attach(self, client: CoreClient) -> None:
        """Start stepping a core."""
        self.post(lambda: self._clients.append(client))

    def detach(self, client: CoreClient) -> None:
        """Stop stepping a core; returns once no step of it is under way.

        That may be after the thread has ended: an `AsyncLLM` that nobody has shut down does it as
        it is collected.
        """
        done: Future[None] = Future()

        def job() -> None:
            if client in self._clients:
                self._clients.remove(client)
            done.set_result(None)

        self.post(job)
        with GATE.yielded():  # a constructor that fails detaches in the middle of exclusive work
            while self._thread.is_alive() and not done.done():
                wait([done], timeout=ALIVE_S)

    def stop(self) -> None:
        """End the thread after the jobs posted so far."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._omp_threads is not None:
            torch.get_num_threads()  # or torch would set the thread's number when it first computes
            # Each of the libraries in the process has an OpenMP of its own; it holds by thread.
            threadpool_limits(self._omp_threads, user_api="openmp")
        while True:
            working = [client for client in self._clients if client.has_work()]
            if not working:
                end_openmp_pools()  # or runs on other threads would wait at their barriers
            if not self._drain(block=not working):
                return
            if not working:
                continue
            # One turn at the gate for all, so that no stream waits for two exclusive holders.
            with WATCHDOG.watch("a step of vLLM"), GATE.step():
                for client in working:
                    if client in self._clients:  # a job just run may have detached it
                        client.step()
            # Nothing may keep a dead core alive while the thread waits.
            working.clear()
            client = None  # type: ignore[assignment]

    def _drain(self, *, block: bool) -> bool:
        while True:
            try:
                job = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            with WATCHDOG.watch("a call of vLLM"):
                job()
            block = False


class CoreClient:
    """What `AsyncLLM` talks to in place of a core in another process."""

    engine_ranks_managed = (0,)
    dp_engines_running = False

    def __init__(
        self, thread: CoreThread, vllm_config: Any, executor_class: Any, *, log_stats: bool
    ) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.error: BaseException | None = None
        """Why the core is lost. Set on the event loop, together with the news of it."""
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called on the event loop when a step raised and the core is lost."""
        self.parked: frozenset[str] = frozenset()
        """Blocks that are off the device, or on their way. With any, no step is taken."""
        self._lost = False
        self._thread = thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
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
        """One scheduling and decoding step of this core; the caller holds the gate."""
        try:
            outputs, executed = self.core.step_fn()
            self.core.post_step(model_executed=executed)
        except Exception as error:
            log.exception("a vLLM engine core failed")
            self._fail(error)
            return
        if outputs and (mine := outputs.get(0)) is not None:
            self._deliver(mine)

    def _fail(self, error: BaseException) -> None:
        self._lost = True
        # First: who gets the error may ask again at once, and must not be given this core.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell_lost, error)
        self._deliver(EngineDeadError())

    def _deliver(self, item: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, item)

    # On the event loop.

    def _tell_lost(self, error: BaseException) -> None:
        # AsyncLLM refuses requests by the flag: not before the engine knows why.
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
        """Queue a request; a request the core refuses is answered with an error output."""

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

        if self.error is not None:
            raise EngineDeadError
        self._thread.post(add)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Drop requests and free their KV cache before the next step."""

        def abort() -> None:
            if not self._lost and self.core is not None:
                self.core.abort_requests(request_ids)

        self._thread.post(abort)

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Run `function(core)` on the core thread."""
        result: Future[Any] = Future()

        def job() -> None:
            try:
                result.set_result(function(self.core))
            except Exception as error:
                result.set_exception(error)

        self._thread.post(job)
        return result

    def set_aside(self, blocks: Collection[str]) -> Future[None]:
        """Take no step from now on, so that these blocks can leave the device.

        Raises:
            RuntimeError: requests are running; nothing was changed. Through the future.

        """

        def finish(core: Any) -> None:
            if core.scheduler.has_unfinished_requests():
                raise RuntimeError("a model was to be parked with requests in its core")
            while self.has_work():  # what ended or was aborted is still to be cleared away
                with GATE.step():
                    self.step()
            if KV_CACHE in blocks and not core.reset_prefix_cache():
                raise RuntimeError("blocks of the KV cache are in use without a request")
            self.parked |= frozenset(blocks)

        return self.call(finish)

    def take_back(self, blocks: Collection[str]) -> Future[None]:
        """Step again, unless other blocks are still off the device."""

        def step_again(_core: Any) -> None:
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
