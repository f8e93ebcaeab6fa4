"""Real vLLM in this process, shared by the tests that need it: importing it takes ten seconds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.memory.device import CpuDevice
from engine.process.heap import freeze_heap, thaw_heap
from engine.process.torch_state import share_torch_state
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.runtime import VllmRuntime

MakeModel = Callable[..., ModelConfig]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the starter models of these tests are built."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A starter model's configuration; options can be overridden."""

    def make(model_id: str, starter: str = "tiny-llama", **options: Any) -> ModelConfig:
        settings = {
            "dtype": "float32",
            "max_model_len": 512,
            "kv_cache": "64MiB",
            "max_num_seqs": 128,
            **options,
        }
        task = "embed" if starter == "tiny-embed" else "generate"
        if task == "embed":
            settings["kv_cache"] = None
        return ModelConfig(id=model_id, source=f"starter:{starter}", task=task, options=settings)

    return make


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """As in a running engine; what is imported later is not frozen, unless it is done again."""
    freeze_heap()
    yield
    thaw_heap()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_runtime(cache_dir: Path) -> AsyncIterator[VllmRuntime]:
    """The runtime, started as the engine starts it."""
    device = CpuDevice()
    runtime = VllmRuntime(RuntimeContext(device, cache_dir))
    runtime.start()
    share_torch_state()
    await runtime.warm_up()
    freeze_heap()
    device.set_baseline()
    yield runtime
    await runtime.stop()
    thaw_heap()
