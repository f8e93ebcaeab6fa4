"""The import of vLLM, once a process. Nothing here imports it before `import_vllm`."""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine.config import is_service_link
from engine.requests import TextOperation
from engine.runtimes.vllm.fill_mask import FillMaskBody

if TYPE_CHECKING:
    from engine.runtimes.vllm.core_thread import CoreThread

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

PORT_VARIABLE = "VLLM_PORT"
"""Kubernetes sets it to `tcp://…` for a Service called `vllm`, and vLLM fails on that."""

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


@dataclass(frozen=True, slots=True)
class Library:
    """What a runtime takes of vLLM, and of our modules that import it."""

    core_thread: ModuleType
    metrics: ModuleType
    patch_vllm: Callable[[], None]
    make_clients: Callable[[CoreThread], None]
    """Has each engine from now on live on this thread."""
    schemas: Mapping[TextOperation, Any]
    """Of the bodies that vLLM reads."""


def import_vllm(device_kind: str) -> Library:
    """Import vLLM in an environment for one process. It takes some ten seconds."""
    if is_service_link("vllm", PORT_VARIABLE, os.environ.get(PORT_VARIABLE, "")):
        del os.environ[PORT_VARIABLE]
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    from engine.runtimes.vllm.imports import sparing_imports

    with sparing_imports(eager=device_kind == "cpu"):
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

    def make_clients(cores: CoreThread) -> None:
        def make(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> Any:
            return core_client.CoreClient(cores, vllm_config, executor_class, log_stats=log_stats)

        EngineCoreClient.make_async_mp_client = staticmethod(make)

    return Library(
        core_thread,
        metrics,
        patches.patch_vllm,
        make_clients,
        {
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
        },
    )
