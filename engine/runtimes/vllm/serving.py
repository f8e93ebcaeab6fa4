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


def forget_tokenizers() -> None:
    """Drop the caches that keep the tokenizers of engines long gone alive.

    Keyed by tokenizers and their methods, they are made for a process with one
    engine; of a large vocabulary each reload would leave tens of megabytes. The
    cache by path stays: one tokenizer a model, and a reload need not parse it.
    """
    func_utils._supports_kw.cache_clear()
    hf._cached_resolve_chat_template_kwargs.cache_clear()
