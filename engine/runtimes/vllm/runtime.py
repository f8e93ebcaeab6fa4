"""vLLM: models that write, embed, rank and classify text.

The engine cores live on a thread of this process (`core_thread`). Nothing here imports vLLM
before `start`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import pkgutil
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client.registry import CollectorRegistry
from pydantic import ValidationError

from engine.config import ModelConfig, is_service_link
from engine.errors import (
    EngineError,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    OutOfDeviceMemory,
    reason,
)
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.lora_folder import PEFT_CONFIG, PEFT_WEIGHTS, peft_folders
from engine.files.safetensors_header import DTYPE_BYTES, tensor_shapes
from engine.files.source import starter_source
from engine.media.attachments import Kind
from engine.memory.block import Block, Estimate
from engine.memory.device import CudaDevice
from engine.model_folder import WANTED_FILES, PresentFolders, present_folder
from engine.process.gate import GATE
from engine.requests import Request, TextOperation, TextRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.common.compute_thread import ComputeThread
from engine.runtimes.common.torch_errors import is_out_of_memory
from engine.runtimes.recognised import Recognised
from engine.runtimes.vllm.adapter_files import AdapterFiles
from engine.runtimes.vllm.body import (
    check_numbers,
    lazily_read,
    number_fields,
    prepared_body,
    schema_fields,
    settle_messages,
)
from engine.runtimes.vllm.checkpoint import (
    ENCODER_TOKENS,
    Checkpoint,
    position_count,
    read_config,
    tokenizer_length,
)
from engine.runtimes.vllm.dtype import run_dtype
from engine.runtimes.vllm.fill_mask import FillMaskBody
from engine.runtimes.vllm.modalities import (
    TEXT,
    check_attachments,
    folder_senses,
    limits,
    senses,
)
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.pooling_body import check_format
from engine.runtimes.vllm.prompts import FIELDS as PROMPT_FIELDS
from engine.runtimes.vllm.prompts import check_choice, read_prompts
from engine.runtimes.vllm.recognition import CLASSIFIES, recognise_language_model
from engine.runtimes.vllm.refusals import invalid, refusal
from engine.runtimes.vllm.rerank_format import RerankFormat, rerank_format
from engine.runtimes.vllm.tool_choice import check_chosen_tool
from engine.runtimes.vllm.wangchanberta import reads_space_symbol
from engine.runtimes.vllm.warm_up import warm_up_requests
from engine.section import Section

if TYPE_CHECKING:
    from engine.runtimes.vllm.core_thread import CoreThread
    from engine.runtimes.vllm.kept_prefixes import Kept, KeptPrefixes
    from engine.runtimes.vllm.media_memory import MediaMemory
    from engine.runtimes.vllm.park import ModelMemory, Packing

log = logging.getLogger(__name__)

ENVIRONMENT = {
    # Otherwise the CPU platform forces a worker process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Otherwise vLLM pins the whole process to the cores of its first engine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # FlashInfer's is compiled in the step that first needs it, while every stream waits.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Set before vLLM is imported. The operator's own values stay."""

LEAST_KV_BYTES = 64 * 2**20

PORT_VARIABLE = "VLLM_PORT"
"""Kubernetes sets it to `tcp://…` for a Service called `vllm`, and vLLM fails on that."""

ALIVE_POLL_S = 0.2
"""Interval between checks of a thread that does not answer."""

LAZY_MODULES = (
    "compressed_tensors.quantization",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.pooling.factories",
    "vllm.entrypoints.scale_out.factories",
    "vllm.model_executor.warmup.kernel_warmup",
)
"""Modules that vLLM imports only at the first load: 50 MB, and seconds that belong to the start."""

SLOTS = frozenset({"weights", "loras"})
"""Blocks with the slots of LoRAs: a block of their own on a CPU, part of the weights on CUDA."""

TOKENIZER_OPERATIONS = frozenset({TextOperation.TOKENIZE, TextOperation.DETOKENIZE})
SCORE_OPERATIONS = frozenset({TextOperation.RERANK, TextOperation.SCORE})
CLASSIFY_OPERATIONS = frozenset({TextOperation.CLASSIFY, TextOperation.MODERATION})
ANTHROPIC_OPERATIONS = frozenset({TextOperation.MESSAGES, TextOperation.COUNT_TOKENS})
OPERATIONS: Mapping[str, frozenset[TextOperation]] = {
    "generate": frozenset(TextOperation)
    - {
        TextOperation.EMBEDDINGS,
        TextOperation.FILL_MASK,
        *SCORE_OPERATIONS,
        *CLASSIFY_OPERATIONS,
    },
    # Two embeddings have a cosine, so such a model ranks, too. A masked one fills masks.
    "embed": TOKENIZER_OPERATIONS
    | SCORE_OPERATIONS
    | {TextOperation.EMBEDDINGS, TextOperation.FILL_MASK},
    "rerank": TOKENIZER_OPERATIONS | SCORE_OPERATIONS,
    "classify": TOKENIZER_OPERATIONS | CLASSIFY_OPERATIONS,
}
"""What the models of each task can do."""

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
        self._checked: dict[tuple[str, str], Any] = {}
        """Model and name of each LoRA that fits, with what was looked at."""
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
        return (own, *map(_lora_source, options.lora_sources.values()))

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """Only a model that writes has a prefix cache worth keeping."""
        if model.task != "generate" and model.options_as(VllmOptions).kv_host:
            raise ValueError(f"options.kv_host: the task {model.task!r} has no use of it")

    @classmethod
    def lora_folder(cls, model: ModelConfig) -> Path | None:
        """The folder that the options name."""
        folder = model.options_as(VllmOptions).loras
        return None if folder is None else folder.expanduser()

    @classmethod
    def lora_files(cls, model: ModelConfig) -> Mapping[str, Path]:
        """The folders of LoRAs in that folder."""
        return peft_folders(cls.lora_folder(model))

    @classmethod
    def lora_names(cls, model: ModelConfig) -> tuple[str, ...]:
        """Those of the folder, and those that the options name one by one."""
        return cls.adapters(model)

    @classmethod
    def adapters(cls, model: ModelConfig) -> tuple[str, ...]:
        """Any LoRA of the model."""
        options = model.options_as(VllmOptions)
        if not options.takes_loras:
            return ()
        return tuple({**options.lora_sources, **cls.lora_files(model)})

    @classmethod
    def check_lora(cls, model: ModelConfig, folder: Path, cache_dir: Path) -> None:
        """Check its files, against those of the model if they are here."""
        options = model.options_as(VllmOptions)
        base = present_folder(model.source, cache_dir, revision=options.revision)
        shapes = None if base is None else tensor_shapes(sorted(base.glob("*.safetensors")))
        AdapterFiles(folder).check(options, shapes or None)

    def _adapter_folder(self, model: ModelConfig, name: str) -> Path:
        """The folder of a LoRA.

        Raises:
            ModelNotFound: there is none of that name.

        """
        own = self.lora_files(model).get(name)
        if own is not None:
            return own
        source = model.options_as(VllmOptions).lora_sources.get(name)
        if source is None:
            raise ModelNotFound(f"The model '{model.id}:{name}' does not exist.", param="model")
        return self._folder_of(_lora_source(source))

    def _check_adapter(self, model: ModelConfig, name: str) -> None:
        """Return if a LoRA fits the model, as far as the files are here.

        Raises:
            ModelNotFound: there is none of that name.
            InvalidRequest: with the reason.

        """
        try:
            folder = self._adapter_folder(model, name)
        except LoadFailed:
            return  # its files are still to be fetched
        stamps = [folder / each for each in (PEFT_WEIGHTS, PEFT_CONFIG)]
        try:
            stamp = (model, *((each.stat().st_ino, each.stat().st_mtime_ns) for each in stamps))
        except OSError:
            stamp = None
        key = (model.id, name)
        if stamp is None or self._checked.get(key) != stamp:
            try:
                self.check_lora(model, folder, self.context.cache_dir)
            except InvalidRequest as error:
                raise InvalidRequest(f"{name}: {error.message}", param="model") from error
            if stamp is not None:
                self._checked[key] = stamp

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
        if is_service_link("vllm", PORT_VARIABLE, os.environ.get(PORT_VARIABLE, "")):
            del os.environ[PORT_VARIABLE]
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        from pydantic import TypeAdapter

        from engine.runtimes.vllm.imports import sparing_imports

        with sparing_imports(eager=self.context.device.kind == "cpu"):
            from engine.runtimes.vllm import core_client, core_thread, metrics, patches
            from vllm import tool_parsers
            from vllm.entrypoints.anthropic.protocol import (
                AnthropicCountTokensRequest,
                AnthropicMessagesRequest,
            )
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
            from vllm.entrypoints.openai.completion.protocol import CompletionRequest
            from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
            from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
            from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
            from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
            from vllm.entrypoints.serve.tokenize.protocol import (
                DetokenizeRequest,
                TokenizeRequest,
            )
            from vllm.v1.engine.core_client import EngineCoreClient

            for module in LAZY_MODULES:
                import_module(module)
        # What a model writes in place of a call is an answer like any other, not a server's error.
        # vLLM sets the level of all loggers below its own again and again.
        for parser in pkgutil.iter_modules(tool_parsers.__path__, f"{tool_parsers.__name__}."):
            logging.getLogger(parser.name).disabled = True
        self._stat_logger = metrics.stat_logger(self._series)
        patches.patch_vllm()
        self._cores = cores = core_thread.CoreThread(self._omp_threads())

        def make_client(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> Any:
            return core_client.CoreClient(cores, vllm_config, executor_class, log_stats=log_stats)

        EngineCoreClient.make_async_mp_client = staticmethod(make_client)
        schemas: dict[TextOperation, Any] = {
            TextOperation.CHAT: ChatCompletionRequest,
            TextOperation.COMPLETION: CompletionRequest,
            TextOperation.RESPONSES: ResponsesRequest,
            TextOperation.INPUT_TOKENS: ResponsesRequest,
            TextOperation.MESSAGES: AnthropicMessagesRequest,
            TextOperation.COUNT_TOKENS: AnthropicCountTokensRequest,
            TextOperation.EMBEDDINGS: EmbeddingRequest,
            TextOperation.RERANK: RerankRequest,
            TextOperation.SCORE: ScoreRequest,
            TextOperation.CLASSIFY: ClassificationRequest,
            TextOperation.MODERATION: ClassificationRequest,
            TextOperation.FILL_MASK: FillMaskBody,
            TextOperation.TOKENIZE: TokenizeRequest,
            TextOperation.DETOKENIZE: DetokenizeRequest,
        }
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
            self._check_adapter(model, request.adapter)
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
                pair = self._rerank_format(model)
                check_format(
                    body,
                    templated=pair.template is not None,
                    takes_instruction=pair.takes_instruction,
                )

    def _fills_masks(self, model: ModelConfig) -> bool:
        """Whether the model's files have the head. They are read once."""
        folder = self._folder(model)
        if folder not in self._heads:
            self._heads[folder] = Checkpoint(folder).fills_masks
        return self._heads[folder]

    def _rerank_format(self, model: ModelConfig) -> RerankFormat:
        """How a reranker reads a pair. Other models read each text alone."""
        if model.task != "rerank":
            return RerankFormat()
        return rerank_format(read_config(self._folder(model)), model.options_as(VllmOptions))

    def _check_labels(self, model: ModelConfig, checkpoint: Checkpoint) -> None:
        """Refuse a model whose labels do not fit its task, or its moderation.

        A label that nobody mapped would be flagged, or never, by chance.

        Raises:
            LoadFailed: with the labels in words.

        """
        config, options = checkpoint.config, model.options_as(VllmOptions)
        classifies = any(str(each).endswith(CLASSIFIES) for each in config["architectures"])
        count = len(checkpoint.labels)
        if model.task == "rerank" and classifies and count != 1:
            raise LoadFailed(f"{model.id}: a reranker has one label, this one has {count}")
        if options.moderation is None:
            return
        labels, mapped = set(checkpoint.labels), options.moderation.categories.keys()
        for names, said in (
            (labels - mapped, "it has no category for"),
            (mapped - labels, "the model has no label"),
        ):
            if names:
                listed = ", ".join(sorted(map(repr, names)))
                raise LoadFailed(f"{model.id}: moderation.categories: {said} {listed}")

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """All safetensors of the folder."""
        return sorted(self._folder(model).glob("*.safetensors"))

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the safetensors headers; fetch the files first if they are on a hub."""
        checkpoint = Checkpoint(self._folder(model))
        self._check_labels(model, checkpoint)
        expected = self._expected(model, checkpoint)
        dtype = self._dtype(model)
        expected["weights"] += checkpoint.rotary_bytes(dtype)
        if self.context.device.kind == "cpu" and model.task == "generate":
            # A CPU kernel may keep its own form of the matrix that gives the logits beside it.
            expected["weights"] += checkpoint.embedding_bytes(dtype)
        if self._rerank_format(model).overrides:
            # vLLM makes one label of two rows of the output embedding. It is whole until then.
            expected["weights"] += checkpoint.embedding_bytes(dtype)
        nbytes = sum(expected.values())
        parkable = self.context.host is not None
        blocks = tuple(
            Block(name, size, parkable, scratch=name != "weights")
            for name, size in expected.items()
            if size
        )
        # Disk at 1 GB/s and a second of building. The first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _dtype(self, model: ModelConfig) -> str:
        return run_dtype(model, self.context.device.kind)

    def _expected(self, model: ModelConfig, checkpoint: Checkpoint) -> dict[str, int]:
        """Bytes of each block by the files and the options."""
        options, dtype = model.options_as(VllmOptions), self._dtype(model)
        kv_bytes = options.kv_cache or 0
        if not kv_bytes and checkpoint.has_kv_cache(model.task):
            tokens = 4 * checkpoint.max_model_len(options)
            kv_bytes = tokens * checkpoint.kv_bytes_per_token(dtype)
        return {
            "weights": checkpoint.weight_bytes(dtype, model.task),
            "kv_cache": kv_bytes,
            "loras": checkpoint.lora_bytes(options, dtype),
            "workspace": checkpoint.workspace_bytes(options, dtype, model.task)
            + self._media_bytes(model, checkpoint),
        }

    def _media_bytes(
        self, model: ModelConfig, checkpoint: Checkpoint, item_tokens: int | None = None
    ) -> int:
        """What images and the like take on the device beside the weights."""
        options = model.options_as(VllmOptions)
        if not limits(options, senses(checkpoint.config)):
            return 0
        on_cpu = self.context.device.kind == "cpu"
        ready_bytes = options.mm_processor_cache if on_cpu else 0  # otherwise in host memory
        return ready_bytes + checkpoint.media_bytes(options, self._dtype(model), item_tokens)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        """Build the engine on the loading thread and its serving objects on the loop."""
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._check_configured, model)
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

    def _check_configured(self, model: ModelConfig) -> None:
        """Refuse a model whose options name a LoRA that it cannot serve.

        One in the folder is refused when a request asks for it: the others are served.

        Raises:
            LoadFailed: naming the LoRA.

        """
        for name, source in model.options_as(VllmOptions).lora_sources.items():
            folder = self._folder_of(_lora_source(source))
            try:
                self.check_lora(model, folder, self.context.cache_dir)
            except InvalidRequest as error:
                raise LoadFailed(f"options.lora_sources.{name}: {error.message}") from error

    def _build(self, model: ModelConfig) -> tuple[VllmModel, Any]:
        from engine.runtimes.vllm.executor import GatedExecutor
        from engine.runtimes.vllm.imports import compiling_late, prepare_to_compile
        from engine.runtimes.vllm.park import packing
        from engine.runtimes.vllm.request_state import ADAPTIVE
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        checkpoint = Checkpoint(self._folder(model))
        expected = self._expected(model, checkpoint)
        stamp = self._prefix_stamp(model)
        with GATE.exclusive():  # faster: Python during a step slows both down fivefold
            arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
                self._command_line(model, expected["kv_cache"])
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
                expected["workspace"] += self._media_bytes(model, checkpoint, largest)
                expected["workspace"] -= self._media_bytes(model, checkpoint)
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
        prompts = read_prompts(self._folder(model), options)
        pair = self._rerank_format(model) if model.task == "rerank" else None
        loaded = VllmModel(
            llm, memory, options, prompts, pair, as_wangchanberta=self._as_wangchanberta(model)
        )
        loaded.media = media
        if options.takes_loras:
            from engine.runtimes.vllm.adapters import Adapters

            loaded.adapters = Adapters(
                model.id,
                loaded.client,
                worker.model_runner.lora_manager,
                options.host_loras,
                DTYPE_BYTES.get(self._dtype(model), 2),
                partial(self._adapter_folder, model),
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

    def _as_wangchanberta(self, model: ModelConfig) -> bool:
        """Whether the model's texts are rewritten as WangchanBERTa's were."""
        chosen = model.options_as(VllmOptions).preprocessing
        if chosen != "auto":
            return chosen == "wangchanberta"
        folder = self._folder(model)
        return read_config(folder).get("model_type") == "camembert" and reads_space_symbol(folder)

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

    def _prefix_stamp(self, model: ModelConfig) -> Any:
        """What tells one reading of the files from another."""
        files = (*self.weight_files(model), self._folder(model) / "config.json")
        stats = [(path, path.stat()) for path in files]
        return (model, *((str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p, s in stats))

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

    def _command_line(self, model: ModelConfig, kv_bytes: int) -> list[str]:
        options = model.options_as(VllmOptions)
        on_cpu = self.context.device.kind == "cpu"
        eager = on_cpu if options.enforce_eager is None else options.enforce_eager
        line = [
            "--model", str(self._folder(model)),
            "--served-model-name", model.id,
            "--dtype", self._dtype(model),
            "--seed", str(options.seed),
            "--max-num-seqs", str(options.max_num_seqs),
            "--load-format", "roundhouse",
            "--runner", "generate" if model.task == "generate" else "pooling",
            # vLLM only checks that this share of the GPU is free. The ledger has done that.
            "--gpu-memory-utilization", "0.001",
            "--no-enable-log-requests",
            "--enable-prompt-tokens-details",
            "--no-use-tqdm-on-load",
        ]  # fmt: skip
        if not on_cpu:
            # Without a size vLLM would measure what is free, and clear the graphs of all engines.
            kv_bytes = kv_bytes or LEAST_KV_BYTES
        if kv_bytes:
            line += ["--kv-cache-memory-bytes", str(kv_bytes)]
        if eager:
            line.append("--enforce-eager")
        if not on_cpu:
            line += ["--worker-cls", "engine.runtimes.vllm.cuda_memory.ParkingWorker"]
        if options.tool_call_parser:
            line += ["--enable-auto-tool-choice", "--tool-call-parser", options.tool_call_parser]
        pair = self._rerank_format(model)
        overrides = {**_matryoshka(options), **pair.overrides}
        if overrides:
            line += ["--hf-overrides", json.dumps(overrides)]
        pooler = _pooler(options)
        if pooler and model.task == "embed":
            line += ["--pooler-config", json.dumps(pooler)]
        for flag, value in (
            ("--max-model-len", self._max_model_len(model)),
            ("--max-num-batched-tokens", options.max_num_batched_tokens),
            ("--quantization", options.quantization),
            ("--reasoning-parser", options.reasoning_parser),
            ("--chat-template", pair.template or options.chat_template),
        ):
            if value is not None:
                line += [flag, str(value)]
        if senses(read_config(self._folder(model))):
            line += ["--limit-mm-per-prompt", json.dumps(options.media_counts)]
            line += ["--mm-processor-cache-gb", str(options.mm_processor_cache / 2**30)]
            if options.mm_processor_kwargs:
                line += ["--mm-processor-kwargs", json.dumps(dict(options.mm_processor_kwargs))]
        if options.chat_template_kwargs:
            kwargs = json.dumps(dict(options.chat_template_kwargs))
            line += ["--default-chat-template-kwargs", kwargs]
        if options.takes_loras:
            line += ["--enable-lora", "--max-loras", str(options.max_loras)]
            line += ["--max-lora-rank", str(options.max_lora_rank)]
            line += ["--max-cpu-loras", str(options.host_loras)]
        return line

    def _max_model_len(self, model: ModelConfig) -> int | None:
        """The length for vLLM; None: it asks the checkpoint, and finds the right one.

        vLLM takes all positions of a RoBERTa for usable. A text with more tokens than there are
        would read beyond the end of a matrix.

        Raises:
            LoadFailed: the options ask for more than there are.

        """
        folder, asked = self._folder(model), model.options_as(VllmOptions).max_model_len
        config = read_config(folder)
        usable, said = position_count(config), config.get("max_position_embeddings")
        if usable is None or usable == said:
            return asked
        if asked is not None and asked > usable:
            raise LoadFailed(
                f"{model.id}: options.max_model_len: the model has {usable} positions, not {asked}"
            )
        return asked or min(usable, tokenizer_length(folder) or usable)

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


def _lora_source(source: str) -> HubSource:
    """The files of a LoRA."""
    return HubSource(source, (PEFT_CONFIG, PEFT_WEIGHTS))


def _matryoshka(options: VllmOptions) -> dict[str, Any]:
    """What the options say of the `dimensions` of embeddings, over what the checkpoint says."""
    said: dict[str, Any] = {}
    if options.is_matryoshka is not None:
        said["is_matryoshka"] = options.is_matryoshka
    if options.matryoshka_dimensions is not None:
        said["matryoshka_dimensions"] = list(options.matryoshka_dimensions)
    return said


def _pooler(options: VllmOptions) -> dict[str, Any]:
    """What the options say of how an embedding is made, over what the checkpoint says."""
    said: dict[str, Any] = {}
    if options.pooling is not None:
        said["seq_pooling_type"] = options.pooling.upper()
    if options.normalize is not None:
        said["use_activation"] = options.normalize
    return said


def _load_failed(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else LoadFailed(reason(error))
