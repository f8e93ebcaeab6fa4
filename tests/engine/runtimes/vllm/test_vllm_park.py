"""Real vLLM engines that leave the device and come back without being rebuilt."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import statistics
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.errors import OutOfDeviceMemory, RuntimeFailed
from engine.events import Document, Frame
from engine.memory.host_memory import HostMemory
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.starters.registry import ensure_starter
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.vllm.greedy import PROMPTS, answer, completion, text_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

WAIT_S = 60.0
MIB = 2**20
EVERYTHING = ("weights", "kv_cache", "workspace")

MakeLlama = Callable[..., Path]


@pytest.fixture(autouse=True)
def host(vllm_runtime: VllmRuntime) -> Iterator[HostMemory]:
    """Room for master copies, all of which must be back in the end."""
    memory = HostMemory(2 * 2**30, pinned=False)
    vllm_runtime.context = replace(vllm_runtime.context, host=memory)
    yield memory
    vllm_runtime.context = replace(vllm_runtime.context, host=None)
    assert memory.used_bytes == 0


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    return loaded


def block_bytes(loaded: VllmModel) -> dict[str, int]:
    return {block.name: block.nbytes for block in loaded.blocks()}


def resident_bytes(runtime: VllmRuntime) -> int:
    gc.collect()
    runtime.context.device.release_cached()
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)  # pages of files come and go as the system likes


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """Builds a Llama of random float32 weights with the starter's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(name: str, **shape: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        starter = ensure_starter("tiny-llama", folder / "cache")
        for file in starter.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        written = json.loads((starter / "config.json").read_text())
        kept = {key: written[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
        config = LlamaConfig(**{**kept, "max_position_embeddings": 2048, **shape})
        torch.manual_seed(3)
        with torch.no_grad():
            LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def large(make_llama: MakeLlama) -> Path:
    """262 MiB of weights in float32."""
    return make_llama(
        "large",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )


def model_at(folder: Path, **options: Any) -> ModelConfig:
    settings = {"dtype": "float32", "max_model_len": 512, "kv_cache": "64MiB", **options}
    return ModelConfig(id=folder.name, source=str(folder), options=settings)


@pytest_asyncio.fixture(loop_scope="session")
async def llama(
    vllm_runtime: VllmRuntime, make_model: MakeModel, host: HostMemory
) -> AsyncIterator[tuple[ModelConfig, VllmModel]]:
    model = make_model("llama")
    loaded = await load(vllm_runtime, model)
    yield model, loaded
    if loaded.llm is not None:
        await vllm_runtime.unload(loaded)


async def answers(
    runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, prompts: Sequence[str] = PROMPTS
) -> list[str]:
    return [await answer(runtime, model, loaded, prompt) for prompt in prompts]


async def on_core(loaded: VllmModel, look: Callable[[Any], Any]) -> Any:
    return await asyncio.wrap_future(loaded.client.call(look))


async def stream(
    runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, frames: asyncio.Queue[str]
) -> str:
    """A long answer, each piece of which is told as it comes."""
    text = ""
    prepared = runtime.prepare(model, completion(model.id, PROMPTS[1], max_tokens=400))
    async for event in loaded.run(prepared):
        assert isinstance(event, Frame)
        text += text_of(event)
        frames.put_nowait(text)
    return text


async def frames_come(frames: asyncio.Queue[str], count: int) -> None:
    """Wait until so many more pieces have come."""
    while not frames.empty():
        frames.get_nowait()
    async with asyncio.timeout(WAIT_S):
        for _ in range(count):
            await frames.get()


async def bytes_moved(
    runtime: VllmRuntime, loaded: VllmModel, names: Collection[str]
) -> tuple[int, int]:
    """Bytes that leave the process with a park and come back with a wake: medians of three.

    Other memory of the process grows and shrinks in between, now and then by tens of megabytes.
    """
    left, came_back = [], []
    for _ in range(3):
        if "kv_cache" in names:
            await on_core(loaded, write_kv_cache)
        before = resident_bytes(runtime)
        await runtime.park(loaded, names)
        without = resident_bytes(runtime)
        await runtime.wake(loaded, names)
        left.append(before - without)
        came_back.append(resident_bytes(runtime) - without)
    return statistics.median_low(left), statistics.median_low(came_back)


def write_kv_cache(core: Any) -> None:
    """All of it, so that all of it is resident; the prefixes it holds are lost."""
    for cache in core.model_executor.driver_worker.worker.model_runner.kv_caches:
        cache.zero_()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_bytes_of_each_block_leave_the_process(
    vllm_runtime: VllmRuntime, large: Path, dtype: str
) -> None:
    """In float32 vLLM's kernels keep the weights where torch does not see them."""
    model = model_at(large, dtype=dtype, kv_cache="128MiB")
    loaded = await load(vllm_runtime, model)
    sizes = block_bytes(loaded)
    expected = await answers(vllm_runtime, model, loaded, PROMPTS[:1])
    assert sizes["weights"] > (240 if dtype == "float32" else 120) * MIB
    assert all(block.parkable for block in loaded.blocks())
    for names in (("kv_cache",), ("weights",), EVERYTHING):
        left, came_back = await bytes_moved(vllm_runtime, loaded, names)
        # A workspace is there only where it was written, and a KV cache comes back only there.
        written = [sizes[name] for name in names if name != "workspace"]
        assert left == pytest.approx(sum(written), rel=0.05)
        assert came_back == pytest.approx(
            sizes["weights"] if "weights" in names else 0, rel=0.05, abs=MIB
        )
        assert await answers(vllm_runtime, model, loaded, PROMPTS[:1]) == expected
    await vllm_runtime.unload(loaded)


async def test_a_second_form_of_a_tied_head_is_counted_and_an_unused_one_freed(
    vllm_runtime: VllmRuntime, make_llama: MakeLlama
) -> None:
    """vLLM packs the embedding twice: as the head, and as if it were a linear layer itself."""
    folder = make_llama(
        "tied",
        vocab_size=60_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = model_at(folder)
    loaded = await load(vllm_runtime, model)
    weights = block_bytes(loaded)["weights"]
    embedding = 60_000 * 256 * 4
    assert 2 * embedding < weights < 2.2 * embedding
    estimate = {block.name: block.nbytes for block in vllm_runtime.estimate(model).blocks}
    assert weights == pytest.approx(estimate["weights"], rel=0.02)
    left, _ = await bytes_moved(vllm_runtime, loaded, ("weights",))
    assert left == pytest.approx(weights, rel=0.05)
    await vllm_runtime.unload(loaded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_waking_reads_no_file(
    vllm_runtime: VllmRuntime, make_llama: MakeLlama, dtype: str
) -> None:
    """What makes it faster than a load (`scripts/bench/swap` has by how much)."""
    folder = make_llama("gone", hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    model = model_at(folder, dtype=dtype)
    loaded = await load(vllm_runtime, model)
    expected = await answers(vllm_runtime, model, loaded)
    await vllm_runtime.park(loaded, EVERYTHING)
    shutil.rmtree(folder)
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert await answers(vllm_runtime, model, loaded) == expected
    await vllm_runtime.unload(loaded)


async def test_twenty_rounds_change_no_answer_and_take_no_memory(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel], host: HostMemory
) -> None:
    model, loaded = llama
    expected = await answers(vllm_runtime, model, loaded)
    used_bytes, resident = host.used_bytes, 0
    for round_ in range(20):
        await vllm_runtime.park(loaded, EVERYTHING)
        if round_ == 1:  # the first leaves what the libraries keep for the next
            resident = resident_bytes(vllm_runtime)
        await vllm_runtime.wake(loaded, EVERYTHING)
        one = round_ % len(PROMPTS)
        assert await answers(vllm_runtime, model, loaded, PROMPTS[one : one + 1]) == [expected[one]]
    await vllm_runtime.park(loaded, EVERYTHING)
    assert resident_bytes(vllm_runtime) - resident < 2 * MIB
    assert host.used_bytes == used_bytes == loaded.host_bytes


async def test_models_park_one_by_one_while_another_streams(
    vllm_runtime: VllmRuntime,
    llama: tuple[ModelConfig, VllmModel],
    make_model: MakeModel,
) -> None:
    model, loaded = llama
    others = [make_model("qwen", "tiny-qwen"), make_model("second")]
    asleep = [await load(vllm_runtime, other) for other in others]
    expected = [await answers(vllm_runtime, *pair) for pair in zip(others, asleep, strict=True)]
    frames: asyncio.Queue[str] = asyncio.Queue()
    alone = await stream(vllm_runtime, model, loaded, frames)
    streaming = asyncio.ensure_future(stream(vllm_runtime, model, loaded, frames))
    await frames_come(frames, 5)
    await vllm_runtime.park(asleep[0], EVERYTHING)
    await vllm_runtime.park(asleep[1], ("kv_cache",))
    await vllm_runtime.wake(asleep[0], EVERYTHING)
    await vllm_runtime.park(asleep[1], ("weights",))
    assert not streaming.done()
    assert await answers(vllm_runtime, others[0], asleep[0]) == expected[0]
    await vllm_runtime.wake(asleep[1], ("weights", "kv_cache"))
    assert await answers(vllm_runtime, others[1], asleep[1]) == expected[1]
    assert await streaming == alone
    for each in asleep:
        await vllm_runtime.unload(each)


@pytest.mark.parametrize("verb", ["park", "wake"])
async def test_a_stream_goes_on_in_the_middle_of_a_transition(
    vllm_runtime: VllmRuntime,
    llama: tuple[ModelConfig, VllmModel],
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    """Neither the gate, the thread that steps nor the event loop is held while bytes move."""
    model, loaded = llama
    other = await load(vllm_runtime, make_model("other"))
    if verb == "wake":
        await vllm_runtime.park(other, EVERYTHING)
    begun, go_on = threading.Event(), threading.Event()
    move = getattr(other.memory, verb)

    def held_up(names: Collection[str]) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        move(names)

    monkeypatch.setattr(other.memory, verb, held_up)
    frames: asyncio.Queue[str] = asyncio.Queue()
    streaming = asyncio.ensure_future(stream(vllm_runtime, model, loaded, frames))
    moving = asyncio.ensure_future(getattr(vllm_runtime, verb)(other, EVERYTHING))
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    try:
        await frames_come(frames, 10)
    finally:
        go_on.set()
    await moving
    await streaming
    await vllm_runtime.unload(other)


async def test_a_parked_model_takes_no_step(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    model, loaded = llama
    for names in (("kv_cache",), ("weights",), ("workspace",)):
        await vllm_runtime.park(loaded, names)
        with pytest.raises(RuntimeFailed, match=f"parked: {names[0]}"):
            await answer(vllm_runtime, model, loaded, "hello")
        assert not await on_core(loaded, lambda core: core.scheduler.has_requests())
        await vllm_runtime.wake(loaded, names)
    assert await answer(vllm_runtime, model, loaded, "hello")


async def test_a_request_that_comes_too_late_waits_for_the_wake(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    """It may have been on its way to the core when that was set aside."""
    from vllm import SamplingParams

    _, loaded = llama

    async def generate(request_id: str) -> list[int]:
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        async for output in loaded.llm.generate("hello", parameters, request_id):
            last = output
        return list(last.outputs[0].token_ids)

    expected = await generate("before")
    await vllm_runtime.park(loaded, EVERYTHING)
    late = asyncio.ensure_future(generate("late"))
    async with asyncio.timeout(WAIT_S):
        while not await on_core(loaded, lambda core: core.scheduler.has_unfinished_requests()):
            assert not late.done()
        await vllm_runtime.check_alive()
        assert not loaded.client.has_work()
        await vllm_runtime.wake(loaded, EVERYTHING)
        assert await late == expected


async def test_a_running_model_is_not_parked(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    model, loaded = llama
    frames: asyncio.Queue[str] = asyncio.Queue()
    expected = await stream(vllm_runtime, model, loaded, frames)
    streaming = asyncio.ensure_future(stream(vllm_runtime, model, loaded, frames))
    await frames_come(frames, 3)
    with pytest.raises(RuntimeError, match="while requests run"):
        await vllm_runtime.park(loaded, EVERYTHING)
    assert await streaming == expected


async def test_a_model_parks_at_once_after_a_stream_was_closed(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    model, loaded = llama
    expected = await answers(vllm_runtime, model, loaded)
    events = loaded.run(vllm_runtime.prepare(model, completion(model.id, "hello", max_tokens=400)))
    await anext(events)
    await events.aclose()
    await vllm_runtime.park(loaded, EVERYTHING)
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert await answers(vllm_runtime, model, loaded) == expected


async def test_requests_right_after_a_wake(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    model, loaded = llama
    expected = await answers(vllm_runtime, model, loaded)
    await vllm_runtime.park(loaded, EVERYTHING)
    await vllm_runtime.wake(loaded, EVERYTHING)
    found = await asyncio.gather(*(answer(vllm_runtime, model, loaded, p) for p in PROMPTS))
    assert found == expected


async def test_the_prefix_cache_leaves_with_the_kv_cache_and_only_with_it(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    """Else an answer would be made from blocks of zeros."""
    model, loaded = llama
    await answer(vllm_runtime, model, loaded, "the sea and the sky " * 50, max_tokens=8)

    def cached_blocks(core: Any) -> int:
        return len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    def kv_written(core: Any) -> bool:
        runner = core.model_executor.driver_worker.worker.model_runner
        return any(bool(tensor.any()) for tensor in runner.kv_caches)

    await vllm_runtime.park(loaded, ("weights",))
    await vllm_runtime.wake(loaded, ("weights",))
    assert await on_core(loaded, cached_blocks) > 0
    assert await on_core(loaded, kv_written)
    await vllm_runtime.park(loaded, ("kv_cache",))
    await vllm_runtime.wake(loaded, ("kv_cache",))
    assert await on_core(loaded, cached_blocks) == 0
    assert not await on_core(loaded, kv_written)


async def test_unloading_a_parked_model_gives_everything_back(
    vllm_runtime: VllmRuntime, large: Path, host: HostMemory
) -> None:
    model = model_at(large)
    await vllm_runtime.unload(await load(vllm_runtime, model))
    before = resident_bytes(vllm_runtime)
    for names in (("kv_cache",), EVERYTHING):
        loaded = await load(vllm_runtime, model)
        assert host.used_bytes == loaded.host_bytes > 240 * MIB
        await vllm_runtime.park(loaded, names)
        await vllm_runtime.unload(loaded)
        assert host.used_bytes == 0
    assert resident_bytes(vllm_runtime) - before < 8 * MIB


# The last holds what the files hold, but not the buffers on top.
@pytest.mark.parametrize("room", [None, 4096, 10_600_000])
async def test_without_host_memory_only_the_weights_stay(
    vllm_runtime: VllmRuntime, make_model: MakeModel, room: int | None
) -> None:
    host = None if room is None else HostMemory(room, pinned=False)
    vllm_runtime.context = replace(vllm_runtime.context, host=host)
    model = make_model("llama")
    loaded = await load(vllm_runtime, model)
    parkable = {block.name: block.parkable for block in loaded.blocks()}
    assert parkable == {"weights": False, "kv_cache": True, "workspace": True}
    assert loaded.host_bytes == 0
    assert host is None or host.used_bytes == 0
    expected = await answers(vllm_runtime, model, loaded)
    await vllm_runtime.park(loaded, ("kv_cache", "workspace"))
    await vllm_runtime.wake(loaded, ("kv_cache", "workspace"))
    assert await answers(vllm_runtime, model, loaded) == expected
    await vllm_runtime.unload(loaded)


async def test_weights_that_nobody_sees_are_not_parkable(
    vllm_runtime: VllmRuntime, llama: tuple[ModelConfig, VllmModel]
) -> None:
    """As a quantised kernel would keep them: here layers of which no load took note."""
    from engine.runtimes.vllm.park import CpuMemory, Packing

    _, loaded = llama
    worker = loaded.client.core.model_executor.driver_worker.worker
    expected = block_bytes(loaded)
    memory = CpuMemory(
        worker, Packing(keep_plain=True), HostMemory(64 * MIB, pinned=False), expected
    )
    blocks = {block.name: block for block in memory.blocks}
    assert not blocks["weights"].parkable
    assert blocks["weights"].nbytes == expected["weights"]


async def test_a_wake_that_fails_leaves_the_model_parked(
    vllm_runtime: VllmRuntime,
    llama: tuple[ModelConfig, VllmModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When oneDNN has no memory vLLM falls back to the plain weight, which is not there."""
    from vllm import _custom_ops

    model, loaded = llama
    expected = await answers(vllm_runtime, model, loaded)
    await vllm_runtime.park(loaded, EVERYTHING)
    parked = resident_bytes(vllm_runtime)
    make, made = _custom_ops.create_onednn_mm, 0

    def fail_late(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made > 5:
            raise RuntimeError("could not create a memory object")
        return make(*args)

    with monkeypatch.context() as patched:
        patched.setattr(_custom_ops, "create_onednn_mm", fail_late)
        with pytest.raises(OutOfDeviceMemory):
            await vllm_runtime.wake(loaded, EVERYTHING)
    assert made > 5
    assert resident_bytes(vllm_runtime) - parked < MIB
    with pytest.raises(RuntimeFailed, match="parked: kv_cache, weights, workspace"):
        await answer(vllm_runtime, model, loaded, "hello")
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert await answers(vllm_runtime, model, loaded) == expected


async def test_an_embedding_model_parks(vllm_runtime: VllmRuntime, make_model: MakeModel) -> None:
    """It has no KV cache."""
    model = make_model("embed", "tiny-embed")
    loaded = await load(vllm_runtime, model)
    assert {block.name for block in loaded.blocks()} == {"weights", "workspace"}
    expected = await embedding(vllm_runtime, model, loaded)
    await vllm_runtime.park(loaded, ("weights", "workspace"))
    await vllm_runtime.wake(loaded, ("weights", "workspace"))
    assert await embedding(vllm_runtime, model, loaded) == expected
    await vllm_runtime.unload(loaded)


async def embedding(runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel) -> list[float]:
    body = {"input": "one"}
    request = TextRequest(model.id, TextOperation.EMBEDDINGS, body, request_id="test")
    (event,) = [event async for event in loaded.run(runtime.prepare(model, request))]
    assert isinstance(event, Document)
    vector: list[float] = json.loads(event.body)["data"][0]["embedding"]
    return vector
