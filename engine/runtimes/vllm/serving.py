"""vLLM's serving classes on one engine, and what they leave behind.

Importing this module imports vLLM.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from engine.process.gate import GATE
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.serve.utils import fingerprint
from vllm.renderers import hf
from vllm.utils import func_utils


def serving_objects(llm: Any, arguments: Any, tasks: Any) -> Any:
    """vLLM's serving classes on one engine, which answer its requests.

    Call it on the loading thread: on the event loop, compiling the chat template would hold up
    every stream. vLLM's function is a coroutine, but does not wait for anything of that loop. It
    sets torch to one thread while it runs.
    """
    serving = SimpleNamespace()
    # Otherwise each of the objects hashes the whole configuration for it.
    arguments.fingerprint_value = fingerprint.build_system_fingerprint(llm.vllm_config)
    arguments.fingerprint_mode = "custom"
    with GATE.exclusive():
        asyncio.run(init_app_state(llm, serving, arguments, supported_tasks=tasks))
    return serving


def forget_tokenizers() -> None:
    """Drop the caches that keep the tokenizers of unloaded engines alive.

    Their keys are tokenizers and methods of tokenizers, which suits a process with one engine.
    Here each reload would leave tens of megabytes for a large vocabulary. The cache by path stays:
    it holds one tokenizer a model, and a reload need not parse it again.
    """
    func_utils._supports_kw.cache_clear()
    hf._cached_resolve_chat_template_kwargs.cache_clear()
