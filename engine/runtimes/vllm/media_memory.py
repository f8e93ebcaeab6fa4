"""What a model that sees keeps of images: inputs that are ready, and what its encoder made of them.

Importing this module imports vLLM.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from engine.memory.host_memory import HostMemory, HostMemoryFull
from engine.runtimes.vllm.core_client import CoreClient
from vllm.multimodal.cache import factories
from vllm.transformers_utils import processor as processors

log = logging.getLogger(__name__)

PROCESSOR_ONLY = "processor_only"


def keep_inputs_once() -> None:
    """Have vLLM keep inputs that are ready in one cache a model.

    It keeps what its front sends to a core in another process in two, whose contents must stay in
    step. A request that is counted but never run puts them out of step, and the next one with the
    same image fails. Here front and core share the tensors.
    """
    chosen = factories._get_cache_type

    def in_one_process(vllm_config: Any) -> Any:
        return None if chosen(vllm_config) is None else PROCESSOR_ONLY

    factories._get_cache_type = in_one_process


class MediaMemory:
    """The caches of one loaded model. On a GPU the ready inputs are in host memory."""

    def __init__(self, llm: Any, cache_bytes: int, host: HostMemory | None) -> None:
        """`host` counts the ready inputs; None: the workspace on the device does."""
        self._renderer = llm.renderer
        self._client: CoreClient = llm.engine_core
        self._host: HostMemory | None = None
        self.host_bytes = 0
        # Otherwise what is only counted in tokens would have a cache of its own.
        self._renderer._mm_processor_only_cache = self._renderer._mm_processor_cache
        if host is not None and cache_bytes:
            try:
                host.reserve(cache_bytes)
            except HostMemoryFull as error:
                log.info("images are not kept ready for the model: %s", error)
                self._renderer._mm_processor_cache = None
                self._renderer._mm_processor_only_cache = None
                return
            self._host, self.host_bytes = host, cache_bytes

    def warm_up(self) -> None:
        """Process an image once, on the calling thread: the first one imports and builds."""
        self._renderer.warmup_mm()

    async def forget(self) -> None:
        """Drop all. Call it while no request is in the core or on the way to it."""
        await self._renderer.clear_mm_cache_async()

        def clear(core: Any) -> None:
            core.reset_mm_cache()
            core.reset_encoder_cache()

        await asyncio.wrap_future(self._client.call(clear))

    def close(self) -> None:
        """Count nothing any more. Call it once the engine is shut down."""
        # transformers' processors hold their tokenizer. Those in use are made anew when asked for.
        processors.cached_get_processor.cache_clear()
        if self._host is not None:
            self._host.unreserve(self.host_bytes)
            self._host, self.host_bytes = None, 0
