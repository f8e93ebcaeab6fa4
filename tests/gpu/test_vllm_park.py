"""vLLM parked on a device, eager and with captured graphs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.memory.host_memory import HostMemory
from engine.process.torch_state import share_torch_state
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.engine.runtimes.vllm.greedy import PROMPTS, answer, completion, text_of
from tests.gpu.device import DEVICE, open_check_device, used_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

EVERYTHING = ("weights", "kv_cache", "workspace")
HOST_BYTES = 4 * 2**30
KV_CACHE = "1GiB" if DEVICE == "cuda" else "128MiB"
ROUNDS = 5 if DEVICE == "cuda" else 1
GRAPHS = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has no graphs")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(cache_dir: Path) -> AsyncIterator[VllmRuntime]:
    """The runtime, started as the engine starts it."""
    host = HostMemory(HOST_BYTES, pinned=DEVICE == "cuda")
    runtime = VllmRuntime(RuntimeContext(open_check_device(), cache_dir, host))
    runtime.start()
    share_torch_state()
    await runtime.warm_up()
    yield runtime
    await runtime.stop()


def make(model_id: str, *, eager: bool, **more: object) -> ModelConfig:
    options = {
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache": KV_CACHE,
        "max_num_seqs": 8,
        "enforce_eager": eager,
        **more,
    }
    return ModelConfig(id=model_id, source="starter:tiny-llama", options=options)


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    return loaded


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=GRAPHS)])
async def test_two_engines_park_one_by_one_with_the_same_answers(
    runtime: VllmRuntime, eager: bool
) -> None:
    """Without `enforce_eager` the captured graphs must still find their addresses."""
    before = used_bytes()
    models = [make("one", eager=eager), make("two", eager=eager)]
    loaded = [await load(runtime, model) for model in models]
    expected = [
        [await answer(runtime, model, each, prompt) for prompt in PROMPTS]
        for model, each in zip(models, loaded, strict=True)
    ]
    for _ in range(ROUNDS):
        full = used_bytes()
        await runtime.park(loaded[0], EVERYTHING)
        if DEVICE == "cuda":  # the pages of a KV cache on a CPU come when they are written
            sizes = {block.name: block.nbytes for block in loaded[0].blocks()}
            gone = full - used_bytes()
            assert gone == pytest.approx(sizes["weights"] + sizes["kv_cache"], rel=0.05)
        beside = [await answer(runtime, models[1], loaded[1], prompt) for prompt in PROMPTS]
        assert beside == expected[1]
        await runtime.wake(loaded[0], EVERYTHING)
        found = await asyncio.gather(
            *(answer(runtime, models[0], loaded[0], prompt) for prompt in PROMPTS)
        )
        assert found[0] == expected[0][0]
        assert [
            await answer(runtime, models[0], loaded[0], prompt) for prompt in PROMPTS
        ] == expected[0]
    await runtime.park(loaded[0], EVERYTHING)
    for each in loaded:
        await runtime.unload(each)
    del loaded, each
    gc.collect()
    assert runtime.context.host is not None
    assert runtime.context.host.used_bytes == 0
    if DEVICE == "cuda":
        # Kernels that were loaded meanwhile stay.
        assert used_bytes() - before < 256 * 2**20


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=GRAPHS)])
async def test_a_load_beside_a_stream_leaves_it_whole(runtime: VllmRuntime, eager: bool) -> None:
    """The capture of graphs allows nothing else on the device: it happens behind the gate."""
    first, second = make("first", eager=True), make("second", eager=eager)
    streaming = await load(runtime, first)
    expected = await answer(runtime, first, streaming, PROMPTS[1], 200)
    beside = asyncio.create_task(answer(runtime, first, streaming, PROMPTS[1], 400))
    loaded = await load(runtime, second)
    alone = await answer(runtime, second, loaded, PROMPTS[0])
    assert (await beside).startswith(expected)
    await runtime.unload(streaming)
    assert await answer(runtime, second, loaded, PROMPTS[0]) == alone
    await runtime.unload(loaded)
    assert runtime.context.host is not None and runtime.context.host.used_bytes == 0


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=GRAPHS)])
async def test_a_kept_prefix_is_there_after_a_park_and_after_a_load(
    runtime: VllmRuntime, eager: bool
) -> None:
    model = make("kept", eager=eager, kv_host="256MiB", max_model_len=2048)
    prompt = "the sea and the sky and the ships that go by at night " * 24

    async def asked(loaded: VllmModel) -> tuple[str, bool]:
        prepared = runtime.prepare(model, completion(model.id, prompt))
        text = "".join([text_of(event) async for event in loaded.run(prepared)])
        return text, prepared.usage.cached_tokens > 500

    loaded = await load(runtime, model)
    assert not (await asked(loaded))[1]
    warm = await asked(loaded)  # with the same kernels as below
    assert warm[1]
    for _ in range(ROUNDS):
        await runtime.park(loaded, EVERYTHING)
        await runtime.wake(loaded, EVERYTHING)
        assert await asked(loaded) == warm
    await runtime.unload(loaded)
    loaded = await load(runtime, model)
    assert await asked(loaded) == warm
    await runtime.unload(loaded)
    runtime.forget_prefixes()
    assert runtime.context.host is not None and runtime.context.host.used_bytes == 0
