"""vLLM parked on a card: run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.memory.device import CudaDevice
from engine.memory.host_memory import HostMemory
from engine.process.torch_state import share_torch_state
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.engine.runtimes.vllm.greedy import PROMPTS, answer

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

EVERYTHING = ("weights", "kv_cache", "workspace")
HOST_BYTES = 4 * 2**30


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmRuntime]:
    """The runtime, started as the engine starts it on a card."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device answers")
    host = HostMemory(HOST_BYTES, pinned=True)
    cache_dir = Path(tmp_path_factory.mktemp("cache"))
    runtime = VllmRuntime(RuntimeContext(CudaDevice(), cache_dir, host))
    runtime.start()
    share_torch_state()
    await runtime.warm_up()
    yield runtime
    await runtime.stop()


def make(model_id: str, *, eager: bool) -> ModelConfig:
    options = {
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache": "1GiB",
        "max_num_seqs": 8,
        "enforce_eager": eager,
    }
    return ModelConfig(id=model_id, source="starter:tiny-llama", options=options)


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    return loaded


def free_bytes() -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.parametrize("eager", [True, False])
async def test_two_engines_park_one_by_one_with_the_same_answers(
    runtime: VllmRuntime, eager: bool
) -> None:
    """Without `enforce_eager` the captured graphs must still find their addresses."""
    before = free_bytes()
    models = [make("one", eager=eager), make("two", eager=eager)]
    loaded = [await load(runtime, model) for model in models]
    expected = [
        [await answer(runtime, model, each, prompt) for prompt in PROMPTS]
        for model, each in zip(models, loaded, strict=True)
    ]
    for _ in range(5):
        full = free_bytes()
        await runtime.park(loaded[0], EVERYTHING)
        sizes = {block.name: block.nbytes for block in loaded[0].blocks()}
        gone = free_bytes() - full
        assert gone == pytest.approx(sizes["weights"] + sizes["kv_cache"], rel=0.05)
        beside = [await answer(runtime, models[1], loaded[1], prompt) for prompt in PROMPTS]
        assert beside == expected[1]
        await runtime.wake(loaded[0], EVERYTHING)
        found = await asyncio.gather(
            *(answer(runtime, models[0], loaded[0], prompt) for prompt in PROMPTS[:1])
        )
        assert found == expected[0][:1]
    await runtime.park(loaded[0], EVERYTHING)
    for each in loaded:
        await runtime.unload(each)
    assert runtime.context.host is not None
    assert runtime.context.host.used_bytes == 0
    assert before - free_bytes() < 64 * 2**20
