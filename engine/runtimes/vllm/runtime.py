"""vLLM: models that write, embed, rank and classify text.

The engine cores live on a thread of this process (`core_thread`). Nothing here imports vLLM
before `start`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client.registry import CollectorRegistry
from pydantic import TypeAdapter, ValidationError

from engine.config import ModelConfig
from engine.errors import (
    EngineError,
    InvalidRequest,
    LoadFailed,
    OutOfDeviceMemory,
    reason,
)
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.safetensors_header import DTYPE_BYTES
from engine.files.source import starter_source
from engine.media.attachments import Kind
from engine.memory.block import Estimate
from engine.memory.device import CudaDevice
from engine.model_folder import WANTED_FILES, PresentFolders
from engine.process.gate import GATE
from engine.requests import Request, TextOperation, TextRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.compute_thread import ComputeThread
from engine.runtimes.common.torch_errors import is_out_of_memory
from engine.runtimes.recognised import Recognised
from engine.runtimes.vllm.body import (
    check_numbers,
    lazily_read,
    number_fields,
    prepared_body,
    schema_fields,
    settle_messages,
)
from engine.runtimes.vllm.checkpoint import ENCODER_TOKENS, Checkpoint
from engine.runtimes.vllm.library import import_vllm
from engine.runtimes.vllm.lora_folders import (
    LoraFolders,
    check_lora,
    folder_of_loras,
    lora_names,
    lora_source,
    loras_in_folder,
)
from engine.runtimes.vllm.modalities import (
    TEXT,
    check_attachments,
    folder_senses,
    limits,
)
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.model_files import ModelFiles
from engine.runtimes.vllm.operations import ANTHROPIC_OPERATIONS, OPERATIONS, SCORE_OPERATIONS
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.pooling_body import check_format
from engine.runtimes.vllm.prompts import FIELDS as PROMPT_FIELDS
from engine.runtimes.vllm.prompts import check_choice, read_prompts
from engine.runtimes.vllm.recognition import recognise_language_model
from engine.runtimes.vllm.refusals import invalid, refusal
from engine.runtimes.vllm.tool_choice import check_chosen_tool
from engine.runtimes.vllm.warm_up import warm_up_requests
from engine.section import Section

if TYPE_CHECKING:
    from engine.runtimes.vllm.core_thread import CoreThread
    from engine.runtimes.vllm.kept_prefixes import Kept, KeptPrefixes
    from engine.runtimes.vllm.media_memory import MediaMemory
    from engine.runtimes.vllm.park import ModelMemory, Packing

log = logging.getLogger(__name__)

ALIVE_POLL_S = 0.2
"""Interval between checks of a thread that does not answer."""

SLOTS = frozenset({"weights", "loras"})
"""Blocks with the slots of LoRAs: a block of their own on a CPU, part of the weights on CUDA."""

SERVING = {
    "embed": "serving_embedding",
    "rerank": "serving_scores",
    "classify": "serving_classification",
}
"""vLLM's serving object of each task. It is there only if vLLM can do that with the model."""


class VllmRuntime(Runtime):
    """Loads models of text into vLLM engines of this process."""

    name: ClassVar[str] = "vllm"
    tasks: ClassVar[tuple[str, ...]] = ("generate", "embed", "rerank", "classify")
    Options: ClassVar[type[Section]] = VllmOptions
    peft_loras: ClassVar[bool] = True

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._cores: CoreThread | None = None
        self._loader = ComputeThread("vllm-load")
        self._schemas: dict[TextOperation, Any] = {}
        self._fields: dict[TextOperation, frozenset[str]] = {}
        self._numbers: dict[TextOperation, frozenset[str]] = {}
        self._stat_logger: Any = None
        self._left: dict[str, Kept] = {}
        """Prefixes of models that have been unloaded, by model."""
        self._loras = LoraFolders(context.cache_dir, self._folder_of)
        self._senses = PresentFolders(context.cache_dir, folder_senses, ("config.json",))
        self._heads: dict[Path, bool] = {}
        """Whether a folder's checkpoint fills masks."""
        self._warm = False
        self._series = CollectorRegistry()
        self.metrics = self._series

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The model's own repository, and those of LoRAs."""
        options = model.options_as(VllmOptions)
        own = HubSource(model.source, WANTED_FILES, options.revision)
        return (own, *map(lora_source, options.lora_sources.values()))

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """Only a model that writes has a prefix cache worth keeping."""
        if model.task != "generate" and model.options_as(VllmOptions).kv_host:
            raise ValueError(f"options.kv_host: the task {model.task!r} has no use of it")

    @classmethod
    def lora_folder(cls, model: ModelConfig) -> Path | None:
        """The folder that the options name."""
        return folder_of_loras(model)

    @classmethod
    def lora_files(cls, model: ModelConfig) -> Mapping[str, Path]:
        """The folders of LoRAs in that folder."""
        return loras_in_folder(model)

    @classmethod
    def lora_names(cls, model: ModelConfig) -> tuple[str, ...]:
        """Those of the folder, and those that the options name one by one."""
        return lora_names(model)

    @classmethod
    def adapters(cls, model: ModelConfig) -> tuple[str, ...]:
        """Any LoRA of the model."""
        return lora_names(model)

    @classmethod
    def check_lora(cls, model: ModelConfig, folder: Path, cache_dir: Path) -> None:
        """Check its files, against those of the model if they are here."""
        check_lora(model, folder, cache_dir)

    async def forget_lora(self, loaded: LoadedModel, name: str) -> None:
        """Take it out of host memory, and out of vLLM."""
        assert isinstance(loaded, VllmModel)
        if loaded.adapters is not None:
            await loaded.adapters.forget(name)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """Any architecture with safetensors."""
        return recognise_language_model(repository)

    def start(self) -> None:
        """Import vLLM (some ten seconds) and replace its process-wide parts by ours."""
        library = import_vllm(self.context.device.kind)
        self._stat_logger = library.metrics.stat_logger(self._series)
        library.patch_vllm()
        self._cores = cores = library.core_thread.CoreThread(self._omp_threads())
        library.make_clients(cores)
        schemas = library.schemas
        self._schemas = {each: TypeAdapter(schema) for each, schema in schemas.items()}
        self._fields = {each: schema_fields(schema) for each, schema in schemas.items()}
        self._numbers = {each: number_fields(schema) for each, schema in schemas.items()}

    def _omp_threads(self) -> int | None:
        """One fewer than there are, as vLLM has it, unless the operator says how many.

        The event loop wants a core as well, and threads that wait for each other at barriers
        get nothing done without theirs: on two cores one stream was half as fast with two.
        """
        if self.context.device.kind != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return None
        import torch

        threads: int = torch.get_num_threads()
        return max(1, threads - 1)

    async def warm_up(self) -> None:
        """Load, run and unload a tiny model of random weights.

        The first engine of a process joins parallel groups, starts thread pools,
        fills kernel caches and imports the rest of vLLM: a second and some 50 MB
        that would otherwise count as the first model's.
        """
        model = ModelConfig(
            id="warm-up",
            source=starter_source("tiny-llama"),
            options={
                "dtype": "float32",
                "max_model_len": 1024,
                "kv_cache": "16MiB",
                "tool_call_parser": "llama3_json",
            },
        )
        # Nothing of it is parked: it needs no master copies.
        context, self.context = self.context, replace(self.context, host=None)
        try:
            await self._warm_up_with(model)
        finally:
            self.context = context
        self._warm = True

    async def _warm_up_with(self, model: ModelConfig) -> None:
        loaded = await self.load(model, lambda reason: log.error("warm-up failed: %s", reason))
        body = {"prompt": "hello " * 60, "max_tokens": 32, "stream": True}
        request = TextRequest(model.id, TextOperation.COMPLETION, body, request_id="warm-up")

        async def answer(request: TextRequest) -> None:
            async for _ in loaded.run(self.prepare(model, request)):
                pass

        await asyncio.gather(*(answer(request) for _ in range(8)))

        async def try_out(request: TextRequest) -> None:
            try:
                await answer(request)
            except EngineError as error:  # a model may do without this kind
                log.error("%s failed: %s", request.request_id, error)

        await asyncio.gather(*(try_out(each) for each in warm_up_requests(model.id)))
        await self.unload(loaded)

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Parse the body with vLLM's own schema for the operation."""
        allowed = OPERATIONS[model.task]
        if not isinstance(request, TextRequest) or request.operation not in allowed:
            raise InvalidRequest(
                f"The model {model.id!r} does not support {request.operation.value}.",
                param="model",
            )
        if request.adapter is not None:
            self._loras.check(model, request.adapter)
        self._check_by_files(model, request)
        body = prepared_body(request, model, self._fields[request.operation])
        check_numbers(body, self._numbers[request.operation])
        try:
            payload = self._schemas[request.operation].validate_python(dict(body))
            if request.operation in ANTHROPIC_OPERATIONS:
                check_chosen_tool(payload)
        except ValidationError as error:
            place = lazily_read(error, body)
            value: Any = body
            for part in place:
                value = value[part]
            raise invalid(error, value, place) from error
        except EngineError:
            raise
        except Exception as error:  # vLLM's validators also raise errors of their own
            raise refusal(str(error), getattr(error, "parameter", None), body) from error
        settle_messages(payload, body)
        thinking = getattr(payload, "thinking", None)
        if thinking is not None and model.options_as(VllmOptions).reasoning_parser is None:
            # vLLM would refuse to bound thoughts that it cannot tell from the answer.
            payload.thinking = None
        elif thinking is not None and thinking.type != "disabled":
            # vLLM only bounds thoughts. The options of the model may have turned them off.
            given = payload.chat_template_kwargs or {}
            payload.chat_template_kwargs = {"enable_thinking": True, **given}
        return Prepared(request=request, payload=payload)

    def inputs(self, model: ModelConfig) -> frozenset[str] | None:
        """Text, and what its files and options say beside."""
        allowed = self._allowed(model)
        return None if allowed is None else frozenset({TEXT, *(each.value for each in allowed)})

    def _allowed(self, model: ModelConfig) -> Mapping[Kind, int] | None:
        """How many of what beside text a request may have; None while the files are not here."""
        options = model.options_as(VllmOptions)
        try:
            found = self._senses.get(model.source, options.revision)
        except LoadFailed:
            return None  # the load will say so
        return None if found is None else limits(options, found)

    def _check_by_files(self, model: ModelConfig, request: TextRequest) -> None:
        """Refuse what the model's options or files rule out. Files that are not here rule nothing.

        Raises:
            InvalidRequest: naming the field.

        """
        body, options = request.body, model.options_as(VllmOptions)
        allowed = self._allowed(model)
        if allowed is not None:
            check_attachments(body, allowed, model.id)
        if request.operation is TextOperation.MODERATION and options.moderation is None:
            raise InvalidRequest(
                f"The model {model.id!r} has no 'moderation' in its options.", param="model"
            )
        if request.operation is TextOperation.EMBEDDINGS:
            check_choice(body)
            if any(body.get(name) is not None for name in PROMPT_FIELDS):
                with suppress(LoadFailed):
                    read_prompts(self._folder(model), options).chosen(body)
        if request.operation is TextOperation.FILL_MASK:
            with suppress(LoadFailed):
                if not self._fills_masks(model):
                    raise InvalidRequest(
                        f"The model {model.id!r} has no head that fills masks.", param="model"
                    )
        if request.operation in SCORE_OPERATIONS:
            with suppress(LoadFailed):
                pair = self._files(model).rerank_format
                check_format(
                    body,
                    templated=pair.template is not None,
                    takes_instruction=pair.takes_instruction,
                )

    def _files(self, model: ModelConfig) -> ModelFiles:
        """The model's files.

        Raises:
            LoadFailed: they are not here.

        """
        return ModelFiles(model, self._folder(model), self.context.device.kind)

    def _fills_masks(self, model: ModelConfig) -> bool:
        """Whether the model's files have the head. They are read once."""
        folder = self._folder(model)
        if folder not in self._heads:
            self._heads[folder] = Checkpoint(folder).fills_masks
        return self._heads[folder]

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """All safetensors of the folder."""
        return self._files(model).weights

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the safetensors headers; fetch the files first if they are on a hub."""
        return self._files(model).estimate(parkable=self.context.host is not None)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        """Build the engine on the loading thread and its serving objects on the loop."""
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._loras.check_configured, model)
        try:
            loaded, arguments = await loop.run_in_executor(self._loader, self._build, model)
        except Exception as error:
            # The frames hold the engine, as long as anything holds the error.
            traceback.clear_frames(error.__traceback__)
            await loop.run_in_executor(self._loader, self._collect)
            raise _load_failed(error) from error
        try:
            await self._bring_prefixes(loaded)
            await self._serve(loaded, arguments)
            needed = SERVING.get(model.task)
            if needed is not None and getattr(loaded.serving, needed) is None:
                raise LoadFailed(f"{model.id}: vLLM cannot {model.task} with this model")
        except Exception as error:
            await self.unload(loaded)
            raise _load_failed(error) from error

        def failed(error: BaseException) -> None:
            on_failure(reason(error))

        loaded.client.on_failure = failed
        return loaded

    def _build(self, model: ModelConfig) -> tuple[VllmModel, Any]:
        from engine.runtimes.vllm.executor import GatedExecutor
        from engine.runtimes.vllm.imports import compiling_late, prepare_to_compile
        from engine.runtimes.vllm.park import packing
        from engine.runtimes.vllm.request_state import ADAPTIVE
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        files = self._files(model)
        expected, stamp = files.expected(), files.stamp()
        with GATE.exclusive():  # faster: Python during a step slows both down fivefold
            arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
                files.command_line(expected["kv_cache"])
            )
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
            if config.model_config.is_multimodal_model:
                scheduler = config.scheduler_config
                scheduler.max_num_encoder_input_tokens = min(
                    scheduler.max_num_encoder_input_tokens, ENCODER_TOKENS
                )
            compiles = not config.model_config.enforce_eager
            if compiles:
                prepare_to_compile()
        host = self.context.host
        keep_plain = host is not None and host.free_bytes >= expected["weights"]
        # An architecture's module is imported here: it may decorate functions of its own.
        eager = not compiles and self.context.device.kind == "cpu"
        late = compiling_late(eager=True) if eager else nullcontext()
        with late, packing(keep_plain=keep_plain) as packed:
            llm = AsyncLLM(
                config,
                GatedExecutor,
                log_stats=self._warm,
                log_requests=False,
                stat_loggers=[self._stat_logger] if self._warm else None,
            )
        llm.output_processor.stream_interval = ADAPTIVE
        options = model.options_as(VllmOptions)
        media: MediaMemory | None = None
        try:
            worker = llm.engine_core.core.model_executor.driver_worker.worker
            if budget := getattr(worker.model_runner, "mm_budget", None):
                media = self._open_media(llm, options)
                largest = max(budget.mm_max_toks_per_item.values(), default=0)
                expected["workspace"] += files.media_bytes(largest) - files.media_bytes()
            memory = self._take_over(worker, packed, expected)
            try:
                llm.engine_core.prefixes = self._kept_prefixes(model, config, worker, stamp)
            except BaseException:
                memory.close()
                raise
        except BaseException:
            llm.shutdown()
            if media is not None:
                media.close()
            raise
        prompts = read_prompts(files.folder, options)
        pair = files.rerank_format if model.task == "rerank" else None
        loaded = VllmModel(
            llm, memory, options, prompts, pair, as_wangchanberta=files.as_wangchanberta
        )
        loaded.media = media
        if options.takes_loras:
            from engine.runtimes.vllm.adapters import Adapters

            loaded.adapters = Adapters(
                model.id,
                loaded.client,
                worker.model_runner.lora_manager,
                options.host_loras,
                DTYPE_BYTES.get(files.dtype, 2),
                partial(self._loras.find, model),
                self.context.host,
            )
        return loaded, arguments

    def _open_media(self, llm: Any, options: VllmOptions) -> MediaMemory:
        from engine.runtimes.vllm.media_memory import MediaMemory

        on_cpu = self.context.device.kind == "cpu"
        host = None if on_cpu else self.context.host
        media = MediaMemory(llm, options.mm_processor_cache, host)
        media.warm_up()
        return media

    def _take_over(self, worker: Any, packed: Packing, expected: dict[str, int]) -> ModelMemory:
        if self.context.device.kind == "cpu":
            from engine.runtimes.vllm.park import CpuMemory

            return CpuMemory(worker, packed, self.context.host, expected)
        from engine.runtimes.vllm.cuda_memory import MAPPED, CudaMemory

        assert isinstance(self.context.device, CudaDevice)
        self.context.device.unmapped_bytes = MAPPED.unmapped_bytes
        memory = CudaMemory(worker, self.context.host, expected)
        # The steps have a stream of their own, which knows nothing of the load's.
        self.context.device.synchronize()
        return memory

    def _kept_prefixes(
        self, model: ModelConfig, config: Any, worker: Any, stamp: Any
    ) -> KeptPrefixes | None:
        """What keeps the prefix cache of a model that was just built, if it is to be kept.

        Raises:
            LoadFailed: that cannot be done for this model.

        """
        limit_bytes, host = model.options_as(VllmOptions).kv_host, self.context.host
        if not limit_bytes or host is None:
            return None
        from engine.runtimes.vllm.kept_prefixes import CannotKeep, KeptPrefixes

        try:
            prefixes = KeptPrefixes(
                model.id,
                worker.model_runner,
                host,
                limit_bytes,
                stamp,
                caches_prefixes=bool(config.cache_config.enable_prefix_caching),
            )
        except CannotKeep as error:
            raise LoadFailed(f"{model.id}: options.kv_host: {error}") from error
        return prefixes

    async def _bring_prefixes(self, loaded: VllmModel) -> None:
        """Fill the empty KV cache of a new engine with what an earlier one left."""
        prefixes = loaded.client.prefixes
        left = None if prefixes is None else self._left.pop(prefixes.owner, None)
        if prefixes is not None and left is not None:
            prefixes.adopt(left)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._loader, prefixes.restore)
            await asyncio.wrap_future(loaded.client.take_back(("kv_cache",)))

    async def _leave_prefixes(self, loaded: VllmModel) -> None:
        """Keep the prefixes of an engine that is about to end, if they are of use to the next.

        A LoRA is known by its name and path: its files may be others at the next load.
        """
        prefixes = loaded.client.prefixes
        if prefixes is None:
            return
        try:
            if loaded.takes_loras or loaded.client.error is not None:
                prefixes.drop()
            elif "kv_cache" not in loaded.client.parked:
                await self._set_aside(loaded, ("kv_cache",))
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._loader, prefixes.save)
        except Exception as error:  # requests run, or the thread has ended
            log.info("the prefixes of a model that is unloaded are lost: %s", reason(error))
            prefixes.drop()
        loaded.client.prefixes = None  # it holds the KV cache
        kept, prefixes.kept = prefixes.kept, None
        if kept is not None:
            self._left[prefixes.owner] = kept

    def forget_prefixes(self) -> None:
        """Give back what unloaded models have left."""
        while self._left and self.context.host is not None:
            from engine.runtimes.vllm.kept_prefixes import give_back

            give_back(self._left.popitem()[1], self.context.host)

    async def _serve(self, loaded: VllmModel, arguments: Any) -> None:
        from engine.runtimes.vllm.serving import serving_objects

        loop = asyncio.get_running_loop()
        loaded.client.connect(loop)
        loaded.llm._run_output_handler()
        tasks = await loaded.llm.get_supported_tasks()
        loaded.serving = await loop.run_in_executor(
            self._loader, serving_objects, loaded.llm, arguments, tasks
        )
        if loaded.adapters is not None:
            # The serving classes share it.
            loaded.adapters.requests = loaded.serving.openai_serving_models.lora_requests

    async def unload(self, loaded: LoadedModel) -> None:
        """Shut the engine down. The parts that other engines share stay."""
        assert isinstance(loaded, VllmModel)
        await self._leave_prefixes(loaded)
        llm, loaded.llm, loaded.serving = loaded.llm, None, None
        handler = llm.output_handler
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, llm.shutdown)
        if handler is not None:
            handler.cancel()
            await asyncio.wait([handler])
        del llm, handler
        if loaded.adapters is not None:
            loaded.adapters.close()
        if loaded.media is not None:
            loaded.media.close()
        loaded.memory.close()
        await loop.run_in_executor(self._loader, self._collect)

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Take blocks off the device; the engine, its tokenizer and its graphs stay.

        Raises:
            RuntimeError: requests are running on the model. Nothing was changed.

        """
        assert isinstance(loaded, VllmModel)
        await self._set_aside(loaded, blocks)
        if loaded.media is not None:
            await loaded.media.forget()
        prefixes = loaded.client.prefixes

        def leave() -> None:
            if prefixes is not None and "kv_cache" in blocks:
                prefixes.save()
            if loaded.adapters is not None and not SLOTS.isdisjoint(blocks):
                loaded.adapters.empty_slots()
            loaded.memory.park(blocks)
            self.context.device.release_cached()

        await asyncio.get_running_loop().run_in_executor(self._loader, leave)

    async def _set_aside(self, loaded: VllmModel, blocks: Collection[str]) -> None:
        if loaded.runs:
            raise RuntimeError("a model was to be parked while requests run on it")
        # vLLM aborts the request of a closed stream some turns of the event loop later.
        await loaded.llm.abort(list(loaded.llm.output_processor.request_states), internal=True)
        await asyncio.wrap_future(loaded.client.set_aside(blocks))

    async def wake(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        """Bring parked blocks back on the loading thread, beside the steps of other models."""
        assert isinstance(loaded, VllmModel)
        loop, prefixes = asyncio.get_running_loop(), loaded.client.prefixes
        try:
            await loop.run_in_executor(self._loader, loaded.memory.wake, blocks)
            if prefixes is not None and "kv_cache" in blocks:
                await loop.run_in_executor(self._loader, prefixes.restore)
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfDeviceMemory(f"no room to wake: {reason(error)}") from error
            raise _load_failed(error) from error
        await asyncio.wrap_future(loaded.client.take_back(blocks))

    def _collect(self) -> None:
        from engine.runtimes.vllm.serving import forget_tokenizers

        forget_tokenizers()
        gc.collect()
        if self.context.device.kind == "cuda":
            from engine.runtimes.vllm.cuda_memory import MAPPED

            MAPPED.sweep()
        self.context.device.release_cached()

    async def check_alive(self) -> None:
        """Wait until the core thread has done a job of ours, or is found to wait at the gate.

        A load may hold the gate for longer than the timeout of a probe. `engine.process.health`
        finds a holder that takes too long.
        """
        if self._cores is None:
            return
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        def answer() -> None:
            if not answered.done():
                answered.set_result(None)

        def come_round() -> None:
            loop.call_soon_threadsafe(answer)

        self._cores.post(come_round)
        while not answered.done() and not self._cores.waits_at_gate:
            await asyncio.wait([answered], timeout=ALIVE_POLL_S)

    async def stop(self) -> None:
        """End the core thread and the loading thread, and give back what models have left."""
        self.forget_prefixes()
        if self._cores is not None:
            await asyncio.to_thread(self._cores.stop)
        self._loader.shutdown()


def _load_failed(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else LoadFailed(reason(error))
