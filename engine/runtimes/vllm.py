"""vLLM: language and embedding models.

The engine cores live on a thread of this process (`vllm_core`), and vLLM's own
serving classes parse the requests and render the answers, so that tools,
reasoning, structured output, logprobs, Responses and Anthropic Messages are
the library's. Nothing here imports vLLM before `start`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prometheus_client.registry import CollectorRegistry
from pydantic import Field, ValidationError

from engine.checkpoint import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.config import ModelConfig, Section
from engine.device import Device
from engine.errors import (
    EngineError,
    InvalidRequest,
    LoadFailed,
    OutOfDeviceMemory,
    RuntimeFailed,
)
from engine.process import GATE
from engine.requests import Document, Event, Frame, Request, TextOperation, TextRequest
from engine.runtimes.base import Block, Estimate, LoadedModel, Prepared, Runtime
from engine.sources import STARTER_PREFIX, local_folder
from engine.units import Size

if TYPE_CHECKING:
    from engine.runtimes.vllm_core import CoreClient, CoreThread

log = logging.getLogger(__name__)

ENVIRONMENT = {
    # The CPU platform else forces a worker process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Else vLLM pins the whole process to the cores of its first engine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Set before vLLM is imported, unless the operator set them."""

LAZY_MODULES = (
    "compressed_tensors.quantization",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.pooling.factories",
    "vllm.entrypoints.scale_out.factories",
    "vllm.model_executor.warmup.kernel_warmup",
)
"""What vLLM imports only at the first load: 50 MB and seconds that belong to the start."""

GENERATE_OPERATIONS = frozenset(TextOperation) - {TextOperation.EMBEDDINGS}
EMBED_OPERATIONS = frozenset(
    {TextOperation.EMBEDDINGS, TextOperation.TOKENIZE, TextOperation.DETOKENIZE}
)


class VllmOptions(Section):
    """Options of a vLLM model; the names are vLLM's where it has one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None takes the checkpoint's own length."""
    kv_cache: Size | None = Field(default=None)
    """Bytes of KV cache; None takes room for four requests of full length."""
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs; None: on a CPU only."""
    quantization: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: Path | None = None
    seed: int = 0
    revision: str | None = None


class Checkpoint:
    """What the files of a model folder say, read without loading a weight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            self.tensors = tensor_sizes(sorted(folder.glob("*.safetensors")))
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{folder.name}: cannot read the checkpoint: {error}") from error
        if not self.tensors:
            raise LoadFailed(f"{folder.name}: no .safetensors file in the folder")

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of a multimodal configuration, else the whole."""
        nested: dict[str, Any] = self.config.get("text_config") or self.config
        return nested

    def item_bytes(self, dtype: str) -> int:
        """Bytes per floating-point element at run time.

        vLLM's "auto" keeps the checkpoint's dtype, but runs float32 ones in 16 bits.
        """
        return DTYPE_BYTES.get(dtype, 2)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights at their run-time dtype; quantised ones stay as they are."""
        return weight_bytes(
            self.tensors, self.item_bytes(dtype), as_stored="quantization_config" in self.config
        )

    def has_kv_cache(self, task: str) -> bool:
        """Whether vLLM gives it a KV cache: all but encoders, which have no notion of KV heads."""
        return task == "generate" or "num_key_value_heads" in self.text_config

    def kv_bytes_per_token(self, dtype: str) -> int:
        """2 (keys, values) × layers × KV heads × head size × bytes per element."""
        config = self.text_config
        heads = int(config.get("num_attention_heads", 1))
        head_dim = config.get("head_dim") or int(config.get("hidden_size", 0)) // heads
        kv_heads = int(config.get("num_key_value_heads") or heads)
        layers = int(config.get("num_hidden_layers", 1))
        return 2 * layers * kv_heads * int(head_dim) * self.item_bytes(dtype)

    def max_model_len(self, options: VllmOptions) -> int:
        """The configured context length, else the checkpoint's."""
        return options.max_model_len or int(self.text_config.get("max_position_embeddings", 2048))

    def workspace_bytes(self, options: VllmOptions) -> int:
        """Activations of the largest step: a full batch's hidden and MLP states, float32 logits."""
        config = self.text_config
        tokens = options.max_num_batched_tokens or max(2048, self.max_model_len(options))
        hidden = int(config.get("hidden_size", 0))
        intermediate = int(config.get("intermediate_size") or 4 * hidden)
        vocabulary = int(config.get("vocab_size", 0))
        activations = tokens * (4 * hidden + 2 * intermediate) * self.item_bytes(options.dtype)
        return activations + options.max_num_seqs * vocabulary * 4


class VllmModel(LoadedModel):
    """One `AsyncLLM` and the serving objects built on it."""

    def __init__(
        self, llm: Any, client: CoreClient, options: VllmOptions, expected: Mapping[str, int]
    ) -> None:
        self.llm = llm
        self.client = client
        self.serving: Any = None
        self._options = options
        self._expected = expected

    @property
    def max_concurrency(self) -> int:
        """vLLM batches by itself; beyond this many it would only queue."""
        return self._options.max_num_seqs

    def blocks(self) -> tuple[Block, ...]:
        """Weights and KV cache by the storages they occupy; the workspace as estimated."""
        runner = self.client.core.model_executor.driver_worker.worker.model_runner
        model = runner.get_model()
        weights = _storage_bytes([*model.parameters(), *model.buffers()])
        found = [
            # On a CPU oneDNN repacks weights into memory of its own and empties the tensor.
            Block("weights", max(weights, self._expected["weights"])),
            Block("workspace", self._expected["workspace"]),
        ]
        if kv := _storage_bytes(runner.kv_caches):
            found.insert(1, Block("kv_cache", kv))
        return tuple(found)

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Answer through vLLM's serving class for the operation."""
        request = prepared.request
        assert isinstance(request, TextRequest)
        try:
            answer = await self._answer(request.operation, prepared.payload)
            if not hasattr(answer, "__aiter__"):
                yield Document(self._document(answer))
                return
            first = True
            try:
                async for piece in answer:
                    frame = Frame(piece if isinstance(piece, str) else _named_event(piece))
                    if first:
                        self._check_first(frame)
                        first = False
                    yield frame
            finally:
                await answer.aclose()
        except EngineError:
            raise
        except Exception as error:
            raise self._translate(error) from error

    async def _answer(self, operation: TextOperation, payload: Any) -> Any:
        serving = self.serving
        match operation:
            case TextOperation.CHAT:
                return await serving.openai_serving_chat.create_chat_completion(payload)
            case TextOperation.COMPLETION:
                return await serving.openai_serving_completion.create_completion(payload)
            case TextOperation.RESPONSES:
                return await serving.openai_serving_responses.create_responses(payload)
            case TextOperation.MESSAGES:
                return await serving.anthropic_serving_messages.create_messages(payload)
            case TextOperation.COUNT_TOKENS:
                return await serving.anthropic_serving_messages.count_tokens(payload)
            case TextOperation.EMBEDDINGS:
                return await serving.serving_embedding(payload)
            case TextOperation.TOKENIZE:
                return await serving.serving_tokenization.create_tokenize(payload, None)
            case TextOperation.DETOKENIZE:
                return await serving.serving_tokenization.create_detokenize(payload, None)

    def _check_first(self, frame: Frame) -> None:
        """Fail before the first byte: vLLM streams a refusal as if it were an answer."""
        _, _, data = frame.data.partition("data: ")
        if '"error"' not in data[:64]:
            return
        error = json.loads(data)["error"]
        raise self._refusal(
            SimpleNamespace(
                error=SimpleNamespace(
                    message=error["message"],
                    code=error.get("code") if isinstance(error.get("code"), int) else 400,
                    param=error.get("param"),
                )
            )
        )

    def _document(self, answer: Any) -> bytes:
        from vllm.entrypoints.anthropic.protocol import (
            AnthropicCountTokensResponse,
            AnthropicMessagesResponse,
        )
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        if isinstance(answer, ErrorResponse):
            raise self._refusal(answer)
        if hasattr(answer, "body"):  # the pooling classes render a response themselves
            return bytes(answer.body)
        anthropic = isinstance(answer, AnthropicMessagesResponse | AnthropicCountTokensResponse)
        text: str = answer.model_dump_json(by_alias=True, exclude_none=anthropic)
        return text.encode()

    def _translate(self, error: Exception) -> EngineError:
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        return self._refusal(create_error_response(error))

    def _refusal(self, response: Any) -> EngineError:
        info = response.error
        if self.client.error is not None:
            if _is_out_of_memory(self.client.error):
                return OutOfDeviceMemory(f"The device ran out of memory: {self.client.error}")
            return RuntimeFailed(f"The model failed while running: {_reason(self.client.error)}")
        if 400 <= info.code < 500:
            return InvalidRequest(info.message, param=info.param, status=info.code)
        return RuntimeFailed(info.message)


class VllmRuntime(Runtime):
    """Loads language and embedding models into vLLM engines of this process."""

    name: ClassVar[str] = "vllm"
    Options: ClassVar[type[Section]] = VllmOptions

    def __init__(self, device: Device, cache_dir: Path) -> None:
        self._device = device
        self._cache_dir = cache_dir
        self._cores: CoreThread | None = None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="vllm-load")
        self._schemas: dict[TextOperation, Any] = {}
        self._stat_logger: Any = None
        self._warm = False
        self._series = CollectorRegistry()
        self.metrics = self._series

    def start(self) -> None:
        """Import vLLM (some ten seconds) and take over what it would share."""
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        from pydantic import TypeAdapter
        from vllm.entrypoints.anthropic.protocol import (
            AnthropicCountTokensRequest,
            AnthropicMessagesRequest,
        )
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
        from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
        from vllm.v1.engine.core_client import EngineCoreClient

        from engine.runtimes import vllm_core, vllm_metrics

        for module in LAZY_MODULES:
            import_module(module)
        self._stat_logger = vllm_metrics.stat_logger(self._series)
        vllm_core.own_process_state()
        self._cores = cores = vllm_core.CoreThread()

        def make_client(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> Any:
            return vllm_core.CoreClient(cores, vllm_config, executor_class, log_stats=log_stats)

        EngineCoreClient.make_async_mp_client = staticmethod(make_client)
        self._schemas = {
            TextOperation.CHAT: TypeAdapter(ChatCompletionRequest),
            TextOperation.COMPLETION: TypeAdapter(CompletionRequest),
            TextOperation.RESPONSES: TypeAdapter(ResponsesRequest),
            TextOperation.MESSAGES: TypeAdapter(AnthropicMessagesRequest),
            TextOperation.COUNT_TOKENS: TypeAdapter(AnthropicCountTokensRequest),
            TextOperation.EMBEDDINGS: TypeAdapter(EmbeddingRequest),
            TextOperation.TOKENIZE: TypeAdapter(TokenizeRequest),
            TextOperation.DETOKENIZE: TypeAdapter(DetokenizeRequest),
        }

    async def warm_up(self) -> None:
        """Load, run and unload a tiny model of random weights.

        The first engine of a process joins parallel groups, starts thread pools,
        fills kernel caches and imports the rest of vLLM: a second and some 50 MB
        that would else be taken for the first model's.
        """
        model = ModelConfig(
            id="warm-up",
            source=f"{STARTER_PREFIX}tiny-llama",
            options={"dtype": "float32", "max_model_len": 512, "kv_cache": "16MiB"},
        )
        loaded = await self.load(model, lambda reason: log.error("warm-up failed: %s", reason))
        body = {"prompt": "hello " * 60, "max_tokens": 32, "stream": True}
        request = TextRequest(model.id, TextOperation.COMPLETION, body, request_id="warm-up")

        async def answer() -> None:
            async for _ in loaded.run(self.prepare(model, request)):
                pass

        await asyncio.gather(*(answer() for _ in range(8)))
        await self.unload(loaded)
        self._warm = True

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Parse the body with vLLM's own schema for the operation."""
        allowed = EMBED_OPERATIONS if model.task == "embed" else GENERATE_OPERATIONS
        if not isinstance(request, TextRequest) or request.operation not in allowed:
            raise InvalidRequest(
                f"The model {model.id!r} does not support {request.operation.value}.",
                param="model",
            )
        try:
            payload = self._schemas[request.operation].validate_python(
                {**request.body, "model": model.id}
            )
        except ValidationError as error:
            raise _invalid(error) from error
        except EngineError:
            raise
        except Exception as error:  # vLLM's validators also raise errors of their own
            parameter = getattr(error, "parameter", None)
            raise InvalidRequest(str(error), param=parameter) from error
        return Prepared(request=request, payload=payload)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the safetensors headers; fetch the files first if they are on a hub."""
        expected = self._expected(model)
        nbytes = sum(expected.values())
        blocks = tuple(Block(name, size) for name, size in expected.items() if size)
        # Disk at 1 GB/s and a second of building; the first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def _expected(self, model: ModelConfig) -> dict[str, int]:
        options = model.options
        checkpoint = Checkpoint(self._folder(model))
        kv_bytes = options.kv_cache or 0
        if not kv_bytes and checkpoint.has_kv_cache(model.task):
            tokens = 4 * checkpoint.max_model_len(options)
            kv_bytes = tokens * checkpoint.kv_bytes_per_token(options.dtype)
        return {
            "weights": checkpoint.weight_bytes(options.dtype),
            "kv_cache": kv_bytes,
            "workspace": checkpoint.workspace_bytes(options),
        }

    def _folder(self, model: ModelConfig) -> Path:
        return local_folder(model.source, self._cache_dir, revision=model.options.revision)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        """Build the engine on the loading thread and its serving objects on the loop."""
        loop = asyncio.get_running_loop()
        try:
            loaded, arguments = await loop.run_in_executor(self._loader, self._build, model)
        except Exception as error:
            await loop.run_in_executor(self._loader, self._collect)
            raise _load_failed(error) from error
        try:
            await self._serve(loaded, arguments)
        except Exception as error:
            await self.unload(loaded)
            raise _load_failed(error) from error

        def failed(error: BaseException) -> None:
            on_failure(_reason(error))

        loaded.client.on_failure = failed
        return loaded

    def _build(self, model: ModelConfig) -> tuple[VllmModel, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        from engine.runtimes.vllm_core import GatedExecutor

        expected = self._expected(model)
        with GATE.exclusive():  # for its speed: Python beside a step slows both fivefold
            arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
                self._command_line(model, expected["kv_cache"])
            )
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
        llm = AsyncLLM(
            config,
            GatedExecutor,
            log_stats=self._warm,
            log_requests=False,
            stat_loggers=[self._stat_logger] if self._warm else None,
        )
        return VllmModel(llm, llm.engine_core, model.options, expected), arguments

    def _command_line(self, model: ModelConfig, kv_bytes: int) -> list[str]:
        options = model.options
        on_cpu = self._device.kind == "cpu"
        eager = on_cpu if options.enforce_eager is None else options.enforce_eager
        line = [
            "--model", str(self._folder(model)),
            "--served-model-name", model.id,
            "--dtype", "bfloat16" if on_cpu and options.dtype == "auto" else options.dtype,
            "--seed", str(options.seed),
            "--max-num-seqs", str(options.max_num_seqs),
            "--load-format", "roundhouse",
            "--runner", "pooling" if model.task == "embed" else "generate",
            # vLLM only checks that this share of the card is free; the ledger has done that.
            "--gpu-memory-utilization", "0.01",
            "--no-enable-log-requests",
            "--no-use-tqdm-on-load",
        ]  # fmt: skip
        if kv_bytes:
            line += ["--kv-cache-memory-bytes", str(kv_bytes)]
        if eager:
            line.append("--enforce-eager")
        if options.tool_call_parser:
            line += ["--enable-auto-tool-choice", "--tool-call-parser", options.tool_call_parser]
        for flag, value in (
            ("--max-model-len", options.max_model_len),
            ("--max-num-batched-tokens", options.max_num_batched_tokens),
            ("--quantization", options.quantization),
            ("--reasoning-parser", options.reasoning_parser),
            ("--chat-template", options.chat_template),
        ):
            if value is not None:
                line += [flag, str(value)]
        return line

    async def _serve(self, loaded: VllmModel, arguments: Any) -> None:
        from engine.runtimes.vllm_core import serving_objects

        loop = asyncio.get_running_loop()
        loaded.client.connect(loop)
        loaded.llm._run_output_handler()
        tasks = await loaded.llm.get_supported_tasks()
        loaded.serving = await loop.run_in_executor(
            self._loader, serving_objects, loaded.llm, arguments, tasks
        )

    async def unload(self, loaded: LoadedModel) -> None:
        """Shut the engine down without touching what the other engines share."""
        assert isinstance(loaded, VllmModel)
        llm, loaded.llm, loaded.serving = loaded.llm, None, None
        handler = llm.output_handler
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, llm.shutdown)
        if handler is not None:
            handler.cancel()
            await asyncio.wait([handler])
        del llm, handler
        await loop.run_in_executor(self._loader, self._collect)

    def _collect(self) -> None:
        from engine.runtimes.vllm_core import forget_tokenizers

        forget_tokenizers()
        gc.collect()
        self._device.release_cached()

    async def check_alive(self) -> None:
        """Wait until the core thread has come round to a job of ours."""
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
        await answered

    async def stop(self) -> None:
        """End the core thread and the loading thread."""
        if self._cores is not None:
            await asyncio.to_thread(self._cores.stop)
        self._loader.shutdown()


def _storage_bytes(tensors: list[Any]) -> int:
    """Device bytes of the distinct storages under some tensors."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _named_event(event: Any) -> str:
    """A Responses event as server-sent-event text."""
    return f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    # Tags of a union's branches are not part of the document; they contain brackets or are classes.
    parts = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    while parts and isinstance(parts[0], str) and parts[0][:1].isupper():
        parts.pop(0)
    param = ""
    for part in parts:
        param += f"[{part}]" if isinstance(part, int) else f".{part}"
    param = param.lstrip(".")
    message = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param or None)


def _load_failed(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else LoadFailed(_reason(error))


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def _reason(error: BaseException) -> str:
    """The first line of an error, for people; the log has the rest."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
