"""Real vLLM engines side by side in this process: what they share must not show."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed, RuntimeFailed
from engine.events import Document, Frame
from engine.process.gate import GATE
from engine.requests import TextOperation, TextRequest
from engine.runtimes.base import LoadedModel
from engine.runtimes.vllm.checkpoint import Checkpoint
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.vllm.greedy import PROMPTS, answer, completion

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

WAIT_S = 60.0


def ignore(reason: str) -> None:
    """Take the news of a model's death; the tests look at the model itself."""


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, ignore)
    assert isinstance(loaded, VllmModel)
    return loaded


@pytest_asyncio.fixture(loop_scope="session")
async def pair(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> AsyncIterator[list[tuple[ModelConfig, VllmModel]]]:
    """Two engines, loaded."""
    models = [make_model("llama"), make_model("qwen", "tiny-qwen")]
    loaded = [(model, await load(vllm_runtime, model)) for model in models]
    yield loaded
    for _, each in loaded:
        if each.llm is not None:
            await vllm_runtime.unload(each)


async def answers(runtime: VllmRuntime, model: ModelConfig, loaded: LoadedModel) -> list[str]:
    """One answer after the other."""
    return [await answer(runtime, model, loaded, prompt) for prompt in PROMPTS]


async def test_closing_one_engine_leaves_the_other_running(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """vLLM's own shutdown tears down the parallel groups of the whole process."""
    (_, first), (model, second) = pair
    before = await answers(vllm_runtime, model, second)
    await vllm_runtime.unload(first)
    async with asyncio.timeout(WAIT_S):
        assert await answers(vllm_runtime, model, second) == before


async def test_engines_side_by_side_answer_as_each_alone(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]], make_model: MakeModel
) -> None:
    """Eight streams on each of two engines while a third comes and goes ten times."""
    alone = {model.id: await answers(vllm_runtime, model, loaded) for model, loaded in pair}
    finished = asyncio.Event()
    wrong: list[str] = []
    count = 0

    async def stream(model: ModelConfig, loaded: VllmModel, index: int) -> None:
        nonlocal count
        while True:
            which = index % len(PROMPTS)
            text = await answer(vllm_runtime, model, loaded, PROMPTS[which])
            count += 1
            if text != alone[model.id][which]:
                wrong.append(f"{model.id}: {text!r} instead of {alone[model.id][which]!r}")
            if finished.is_set():
                return

    async def churn() -> None:
        third = make_model("third", dtype="bfloat16")
        try:
            for _ in range(10):
                loaded = await load(vllm_runtime, third)
                assert await answer(vllm_runtime, third, loaded, "hello", max_tokens=4)
                await vllm_runtime.unload(loaded)
        finally:
            finished.set()

    async with asyncio.timeout(4 * WAIT_S), asyncio.TaskGroup() as group:
        group.create_task(churn())
        for model, loaded in pair:
            for index in range(8):
                group.create_task(stream(model, loaded, index))
    assert count >= 32
    assert not wrong


async def test_each_step_has_the_scratch_memory_of_its_own_engine(
    vllm_runtime: VllmRuntime,
    pair: list[tuple[ModelConfig, VllmModel]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM keeps it in one variable of the process, which the last load or unload has set."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker import workspace

    own = {}
    for _, each in pair:
        assert each.llm is not None
        executor = each.llm.engine_core.core.model_executor
        assert executor.driver_worker.workspaces is None, "a CPU has none"
        own[executor] = executor.driver_worker.workspaces = object()
    seen: dict[Any, set[Any]] = {}
    rpc = UniProcExecutor.collective_rpc

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(self, set()).add(workspace._manager)
        return rpc(self, *args, **kwargs)

    monkeypatch.setattr(UniProcExecutor, "collective_rpc", note)
    await asyncio.gather(*(answer(vllm_runtime, *each, PROMPTS[0], 16) for each in pair))
    monkeypatch.undo()
    assert seen == {executor: {workspaces} for executor, workspaces in own.items()}
    workspace._manager = None
    for executor in own:
        executor.driver_worker.workspaces = None


async def test_steps_see_the_usual_state_while_another_model_loads(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    """A load sets torch's default dtype and vLLM's current configuration for everybody."""
    import torch
    import vllm.config.vllm as vllm_config

    seen: set[Any] = set()
    stop = threading.Event()

    def step() -> None:
        while not stop.is_set():
            with GATE.step():
                seen.add((torch.get_default_dtype(), vllm_config._current_vllm_config is None))

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        loaded = await load(vllm_runtime, make_model("other", dtype="bfloat16"))
        await vllm_runtime.unload(loaded)
    finally:
        stop.set()
        stepping.join()
    assert seen == {(torch.float32, True)}


async def test_a_load_leaves_the_process_as_it_found_it(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    import numpy
    import torch
    from vllm.triton_utils import dispatcher

    def state() -> tuple[Any, ...]:
        return (
            random.getstate(),
            numpy.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.set_num_threads,
            torch.get_num_threads(),
            dict(dispatcher._registry),
            threading.active_count(),
        )

    await vllm_runtime.unload(await load(vllm_runtime, make_model("warm")))
    # Away from the state that a load seeds.
    random.random(), numpy.random.random(), torch.rand(1)
    before = state()
    await vllm_runtime.unload(await load(vllm_runtime, make_model("again")))
    assert state() == before
    assert gc.get_freeze_count() > 100_000  # nobody thawed the heap


async def test_steps_have_openmp_threads_of_their_own_number() -> None:
    import torch
    from threadpoolctl import threadpool_info

    from engine.runtimes.vllm.core_thread import CoreThread

    def numbers() -> set[int]:
        openmp = (pool for pool in threadpool_info() if pool["user_api"] == "openmp")
        return {torch.get_num_threads(), *(pool["num_threads"] for pool in openmp)}

    here, before = numbers(), torch.get_num_threads()
    cores = CoreThread(before + 2)
    seen: Future[set[int]] = Future()
    cores.post(lambda: seen.set_result(numbers()))
    there = await asyncio.wrap_future(seen)
    cores.stop()
    assert there == {before + 2}
    assert numbers() == here


async def test_a_thread_that_waits_for_a_load_is_alive(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    model = make_model("llama")
    loaded = await load(vllm_runtime, model)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with GATE.exclusive():
            held.set()
            over.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    await asyncio.to_thread(held.wait)
    answering = asyncio.create_task(answer(vllm_runtime, model, loaded, PROMPTS[0]))
    cores = vllm_runtime._cores
    assert cores is not None
    try:
        async with asyncio.timeout(WAIT_S):
            while not cores.waits_at_gate:
                await asyncio.wait([answering], timeout=0.01)
            await vllm_runtime.check_alive()
        assert not answering.done()
    finally:
        over.set()
        holder.join()
    assert await answering
    async with asyncio.timeout(WAIT_S):
        await vllm_runtime.check_alive()
    await vllm_runtime.unload(loaded)


async def test_an_unknown_architecture_costs_no_second_process(vllm_runtime: VllmRuntime) -> None:
    """vLLM looks at a model's class in a child process that imports vLLM again: ten seconds."""
    from vllm.model_executor.models import registry

    assert registry._run_in_subprocess(os.getpid) == os.getpid()


async def test_loads_asked_for_at_once_do_not_mix(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    """Two builds at once leave parameters on the meta device."""
    models = [make_model("one"), make_model("two", "tiny-qwen")]
    loaded = await asyncio.gather(*(load(vllm_runtime, model) for model in models))
    for each in loaded:
        worker = each.client.core.model_executor.driver_worker.worker
        tensors = [*worker.get_model().parameters(), *worker.get_model().buffers()]
        assert tensors
        assert not any(tensor.is_meta for tensor in tensors)
    for model, each in zip(models, loaded, strict=True):
        assert await answer(vllm_runtime, model, each, "hello")
        await vllm_runtime.unload(each)


async def test_memory_comes_back(vllm_runtime: VllmRuntime, make_model: MakeModel) -> None:
    model = make_model("large-cache", kv_cache="256MiB")
    rss_bytes = psutil.Process().memory_info
    await vllm_runtime.unload(await load(vllm_runtime, model))
    before = rss_bytes().rss
    for _ in range(3):
        loaded = await load(vllm_runtime, model)
        await answer(vllm_runtime, model, loaded, "hello")
        held = rss_bytes().rss
        assert held > before + (200 << 20)
        await vllm_runtime.unload(loaded)
    assert rss_bytes().rss <= before * 1.05


async def test_blocks_are_what_was_asked_for(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """The KV cache has the configured bytes, not a fraction of the machine."""
    for model, loaded in pair:
        blocks = {block.name: block.nbytes for block in loaded.blocks()}
        estimate = {b.name: b.nbytes for b in vllm_runtime.estimate(model).blocks}
        assert 0.95 * (64 << 20) < blocks["kv_cache"] <= 64 << 20
        assert blocks["weights"] == pytest.approx(estimate["weights"], rel=0.02)


async def kv_usage(loaded: VllmModel) -> float:
    """The share of the KV cache that requests hold, asked on the core thread."""
    future = loaded.client.call(lambda core: core.scheduler.kv_cache_manager.usage)
    return float(await asyncio.wrap_future(future))


async def test_closing_a_stream_frees_its_kv_cache(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    model, loaded = pair[0]
    request = vllm_runtime.prepare(model, completion(model.id, "hello", max_tokens=480))
    events = loaded.run(request)
    await anext(events)
    assert await kv_usage(loaded) > 0
    await events.aclose()
    async with asyncio.timeout(WAIT_S):
        while await kv_usage(loaded) > 0:
            pass
    assert not loaded.llm.output_processor.request_states


async def test_cancelling_a_document_frees_its_kv_cache(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    model, loaded = pair[0]
    request = completion(model.id, "hello", max_tokens=480, stream=False)
    events = loaded.run(vllm_runtime.prepare(model, request))
    task = asyncio.ensure_future(anext(events))
    async with asyncio.timeout(WAIT_S):
        while await kv_usage(loaded) == 0:
            assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        while await kv_usage(loaded) > 0:
            pass
    await events.aclose()


async def test_a_failing_step_kills_one_model_only(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    (model, loaded), (other_model, other) = pair

    def fail() -> None:
        raise RuntimeError("the device is on fire")

    loaded.client.core.step_fn = fail
    with pytest.raises(RuntimeFailed, match="on fire"):
        async with asyncio.timeout(WAIT_S):
            await answer(vllm_runtime, model, loaded, "hello")
    with pytest.raises(RuntimeFailed, match="on fire"):
        await answer(vllm_runtime, model, loaded, "hello")
    assert await answer(vllm_runtime, other_model, other, "hello")


async def test_a_model_that_nobody_unloaded_is_collected_after_the_core_thread_has_ended(
    vllm_runtime: VllmRuntime,
) -> None:
    from engine.runtimes.vllm.core_thread import CoreThread

    cores = CoreThread()
    cores.stop()
    client: Any = object()
    detaching = threading.Thread(target=cores.detach, args=(client,), daemon=True)
    detaching.start()
    await asyncio.to_thread(detaching.join, WAIT_S)
    assert not detaching.is_alive()


async def test_a_lost_core_refuses_nobody_before_its_loss_is_told(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    """Who is refused asks again at once, and would be given the same core."""
    loaded = await load(vllm_runtime, make_model("doomed"))
    told: list[bool] = []
    loaded.client.on_failure = lambda _: told.append(loaded.client.resources.engine_dead)

    def fail() -> None:
        raise RuntimeError("the device is on fire")

    loaded.client.core.step_fn = fail
    stepping = threading.Thread(target=loaded.client.step)
    stepping.start()
    stepping.join()  # the event loop stands meanwhile
    assert not loaded.client.resources.engine_dead
    assert loaded.client.error is None
    assert not loaded.client.has_work()
    await asyncio.sleep(0)
    assert told == [True]
    await vllm_runtime.unload(loaded)


async def test_out_of_memory_in_a_step_is_told_apart(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    import torch

    from engine.errors import OutOfDeviceMemory

    model, loaded = pair[0]

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded.client.core.step_fn = fail
    with pytest.raises(OutOfDeviceMemory):
        async with asyncio.timeout(WAIT_S):
            await answer(vllm_runtime, model, loaded, "hello")


def request(operation: TextOperation, **body: Any) -> TextRequest:
    return TextRequest(model="llama", operation=operation, body=body, request_id="test")


@pytest.mark.parametrize(
    ("operation", "body", "param"),
    [
        (TextOperation.CHAT, {}, "messages"),
        (TextOperation.CHAT, {"messages": "hello"}, "messages"),
        (TextOperation.CHAT, {"messages": [], "temperature": "hot"}, "temperature"),
        (TextOperation.COMPLETION, {"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        (TextOperation.MESSAGES, {"messages": []}, "max_tokens"),
        (TextOperation.EMBEDDINGS, {"input": "x"}, "model"),
    ],
)
async def test_a_wrong_body_is_refused_before_anything_is_loaded(
    vllm_runtime: VllmRuntime,
    make_model: MakeModel,
    operation: TextOperation,
    body: dict[str, Any],
    param: str,
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(make_model("llama"), request(operation, **body))
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "a b c d " * 2000}]},
        {"max_tokens": 100_000},
        {"logprobs": True, "top_logprobs": 1000},
    ],
)
async def test_what_only_the_loaded_model_can_refuse_fails_before_the_first_byte(
    vllm_runtime: VllmRuntime,
    pair: list[tuple[ModelConfig, VllmModel]],
    more: dict[str, Any],
    stream: bool,
) -> None:
    model, loaded = pair[0]
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, **more}
    events = loaded.run(vllm_runtime.prepare(model, request(TextOperation.CHAT, **body)))
    with pytest.raises(InvalidRequest) as caught:
        await anext(events)
    assert caught.value.status == 400


async def test_embeddings(vllm_runtime: VllmRuntime, make_model: MakeModel) -> None:
    model = make_model("embed", "tiny-embed")
    loaded = await load(vllm_runtime, model)
    body = request(TextOperation.EMBEDDINGS, input=["one", "two"])
    (event,) = [e async for e in loaded.run(vllm_runtime.prepare(model, body))]
    assert isinstance(event, Document)
    vectors = [item["embedding"] for item in json.loads(event.body)["data"]]
    assert len(vectors) == 2
    assert vectors[0] != vectors[1]
    for vector in vectors:
        assert sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-3)
    await vllm_runtime.unload(loaded)


@pytest.mark.parametrize(
    ("starter", "has_bfloat16", "dtype"),
    [
        ("tiny-embed", True, "float32"),
        ("tiny-llama", False, "float32"),
        ("tiny-llama", True, "bfloat16"),
    ],
)
async def test_the_automatic_dtype_is_the_one_estimated_and_loaded(
    vllm_runtime: VllmRuntime,
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    starter: str,
    has_bfloat16: bool,
    dtype: str,
) -> None:
    from engine.runtimes.vllm import dtype as dtype_module

    monkeypatch.setattr(dtype_module, "multiplies_bfloat16", lambda: has_bfloat16)
    model, plain = (make_model("m", starter, dtype=each) for each in ("auto", dtype))
    assert vllm_runtime.estimate(model) == vllm_runtime.estimate(plain)
    checkpoint = Checkpoint(vllm_runtime._folder(model))
    numbers = sum(count for _, count in checkpoint.tensors.values())
    item_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    assert vllm_runtime._files(model).expected()["weights"] == numbers * item_bytes
    loaded = await load(vllm_runtime, model)
    worker = loaded.client.core.model_executor.driver_worker.worker
    parameters = worker.model_runner.model.parameters()
    assert {str(each.dtype) for each in parameters} == {f"torch.{dtype}"}
    if starter == "tiny-llama":
        automatic = await answer(vllm_runtime, model, loaded, "hello")
        await vllm_runtime.unload(loaded)
        loaded = await load(vllm_runtime, plain)
        assert await answer(vllm_runtime, plain, loaded, "hello") == automatic
    await vllm_runtime.unload(loaded)


@pytest.mark.parametrize("kv_cache", [None, "16MiB"])
async def test_a_decoder_that_embeds_has_a_kv_cache_of_the_configured_size(
    vllm_runtime: VllmRuntime, kv_cache: str | None
) -> None:
    options = {"dtype": "float32", "max_model_len": 128, "kv_cache": kv_cache}
    model = ModelConfig(id="qwen-embed", task="embed", source="starter:tiny-qwen", options=options)
    expected = {block.name: block.nbytes for block in vllm_runtime.estimate(model).blocks}
    loaded = await load(vllm_runtime, model)
    body = request(TextOperation.EMBEDDINGS, input="one")
    (event,) = [e async for e in loaded.run(vllm_runtime.prepare(model, body))]
    assert isinstance(event, Document)
    measured = {block.name: block.nbytes for block in loaded.blocks()}
    assert 0.9 * expected["kv_cache"] < measured["kv_cache"] <= expected["kv_cache"]
    (file,) = vllm_runtime.weight_files(model)
    assert file.name == "model.safetensors"
    await vllm_runtime.unload(loaded)


async def test_one_stream_has_frames_and_ends_as_the_protocol_says(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    model, loaded = pair[0]
    prepared = vllm_runtime.prepare(model, completion(model.id, "hello", max_tokens=4))
    frames = [event async for event in loaded.run(prepared)]
    assert all(isinstance(frame, Frame) and frame.data.endswith("\n\n") for frame in frames)
    assert frames[-1] == Frame("data: [DONE]\n\n")


async def test_logprobs_compile_nothing(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    import torch

    model, loaded = pair[0]
    for more in ({"logprobs": 3}, {"prompt_logprobs": 2, "stream": False}):
        prepared = vllm_runtime.prepare(model, completion(model.id, "hello", **more))
        assert [event async for event in loaded.run(prepared)]
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    assert not hasattr(batched_count_greater_than, "__wrapped__")
    ranks = batched_count_greater_than(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[2.0]]))
    assert ranks.tolist() == [2]


async def test_each_grammar_has_the_backend_that_knows_its_rules(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """vLLM took that of the first request for all: then 3 is a multiple of 10."""
    model, loaded = pair[1]
    manager = loaded.client.core.structured_output_manager
    for rule, backends in ({}, {"xgrammar"}), ({"multipleOf": 1000}, {"xgrammar", "guidance"}):
        number = {"type": "integer", "minimum": 1000, "maximum": 9999, **rule}
        schema = {
            "type": "object",
            "properties": {"a": number},
            "required": ["a"],
            "additionalProperties": False,
        }
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 60,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": schema},
            },
        }
        prepared = vllm_runtime.prepare(model, request(TextOperation.CHAT, **body))
        (event,) = [event async for event in loaded.run(prepared)]
        assert isinstance(event, Document)
        text = json.loads(event.body)["choices"][0]["message"]["content"]
        assert json.loads(text)["a"] % rule.get("multipleOf", 1) == 0
        assert {*manager._backends} == backends


async def test_strings_of_a_bounded_length_are_json(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """vLLM's usual backend lets them hold control characters."""
    model, loaded = pair[1]
    tokenizer = vllm_runtime._folder(model) / "tokenizer.json"
    tokens = json.loads(tokenizer.read_text())["model"]["vocab"]
    text = {"type": "string", "minLength": 30, "maxLength": 40}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"]}
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 200,
        "temperature": 1,
        "seed": 1,
        "n": 8,
        "logit_bias": {
            str(tokens["ā"]): 100
        },  # the character 1, as byte-level vocabularies have it
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }
    prepared = vllm_runtime.prepare(model, request(TextOperation.CHAT, **body))
    (event,) = [event async for event in loaded.run(prepared)]
    assert isinstance(event, Document)
    for choice in json.loads(event.body)["choices"]:
        answer = json.loads(choice["message"]["content"])
        assert answer.keys() == {"a"}
        assert 30 <= len(answer["a"]) <= 40


@pytest.fixture
def damaged(tmp_path: Path, vllm_runtime: VllmRuntime, make_model: MakeModel) -> Path:
    """A copy of a starter model, to be broken."""
    source = vllm_runtime._folder(make_model("x"))
    return Path(shutil.copytree(source, tmp_path / "damaged"))


def at(folder: Path) -> ModelConfig:
    options = {"kv_cache": "16MiB", "max_model_len": 2048}
    return ModelConfig(id="damaged", source=str(folder), options=options)


async def test_a_truncated_checkpoint_is_found_without_loading_it(
    vllm_runtime: VllmRuntime, damaged: Path
) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(LoadFailed, match="truncated"):
        vllm_runtime.estimate(at(damaged))


async def test_missing_folders_and_files_are_named(
    vllm_runtime: VllmRuntime, damaged: Path
) -> None:
    with pytest.raises(LoadFailed, match="no folder"):
        vllm_runtime.estimate(at(damaged / "nowhere"))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(LoadFailed, match="safetensors"):
        vllm_runtime.estimate(at(damaged))


async def test_pickled_weights_are_refused(vllm_runtime: VllmRuntime, damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(LoadFailed):
        await vllm_runtime.load(at(damaged), ignore)


async def test_a_failed_load_gives_back_what_it_took(
    vllm_runtime: VllmRuntime, damaged: Path, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """A weight is missing: known only once the module has been built."""
    from safetensors.numpy import load_file, save_file

    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    await vllm_runtime.unload(await load(vllm_runtime, at(vllm_runtime._folder(pair[0][0]))))
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        with pytest.raises(LoadFailed, match="down_proj"):
            await vllm_runtime.load(at(damaged), ignore)
    assert psutil.Process().memory_info().rss <= before * 1.05
    model, loaded = pair[0]
    assert await answer(vllm_runtime, model, loaded, "hello")


async def test_no_tokenizer_outlives_its_engine(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    """vLLM keeps caches that are keyed by tokenizers and their methods."""

    def tokenizers() -> int:
        gc.collect()
        return sum("Tokenizer" in type(each).__name__ for each in gc.get_objects())

    model = make_model("llama")

    async def round_trip() -> None:
        loaded = await load(vllm_runtime, model)
        await answer(vllm_runtime, model, loaded, "hello", max_tokens=4)
        await vllm_runtime.unload(loaded)

    await round_trip()
    before = tokenizers()
    for _ in range(3):
        await round_trip()
    assert tokenizers() <= before


async def test_two_models_have_their_own_series(
    vllm_runtime: VllmRuntime, pair: list[tuple[ModelConfig, VllmModel]]
) -> None:
    """vLLM wipes the series of one engine when it makes those of the next."""
    assert vllm_runtime.metrics is not None

    def finished(model_id: str) -> float:
        assert vllm_runtime.metrics is not None
        labels = {"engine": "0", "model_name": model_id, "finished_reason": "length"}
        return vllm_runtime.metrics.get_sample_value("vllm:request_success_total", labels) or 0

    before = {model.id: finished(model.id) for model, _ in pair}
    for model, loaded in pair:
        await answer(vllm_runtime, model, loaded, "hello", max_tokens=4)
    for model, _ in pair:
        assert finished(model.id) == before[model.id] + 1


async def test_steps_recorded_together_count_as_each_alone(
    pair: list[tuple[ModelConfig, VllmModel]],
) -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

    from engine.runtimes.vllm.metrics import stat_logger

    apart, together = CollectorRegistry(), CollectorRegistry()

    class Apart(PrometheusStatLogger):  # type: ignore[misc]
        _gauge_cls = staticmethod(partial(Gauge, registry=apart))
        _counter_cls = staticmethod(partial(Counter, registry=apart))
        _histogram_cls = staticmethod(partial(Histogram, registry=apart))

    config = pair[0][1].llm.vllm_config
    loggers = [Apart(config), stat_logger(together)(config)]
    for _ in range(2):  # what was recorded is held no more
        for step in [*steps(30, seed=1), (SchedulerStats(), None)]:
            for logger in loggers:
                logger.record(*deepcopy(step))
    counted = samples(together)
    assert counted == pytest.approx(samples(apart))
    assert counted["vllm:inter_token_latency_seconds_count llama 0"] > 100
    assert counted["vllm:iteration_tokens_total_count llama 0"] > 50
    assert counted["vllm:external_prefix_cache_queries_total llama 0"] == 20


def steps(count: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """What vLLM counts of some steps: each kind of number, and of what only some steps have."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import (
        FinishedRequestStats,
        IterationStats,
        PrefixCacheStats,
        SchedulerStats,
    )

    draw = random.Random(seed)
    for index in range(count):
        iteration = IterationStats()
        iteration.num_generation_tokens = draw.randrange(9)
        iteration.num_preempted_reqs = draw.randrange(2)
        iteration.prompt_token_stats.computed = draw.randrange(500)
        iteration.prompt_token_stats.total = draw.randrange(500)
        iteration.n_params_iter = [1] * draw.randrange(3)
        iteration.time_to_first_tokens_iter = [draw.random() for _ in range(draw.randrange(3))]
        iteration.inter_token_latencies_iter = [
            draw.choice((0.01, 0.025, draw.expovariate(9))) for _ in range(draw.randrange(9))
        ]
        iteration.finished_requests = [
            FinishedRequestStats(FinishReason.STOP, e2e_latency=draw.random() * 9)
            for _ in range(draw.randrange(2))
        ]
        queries = draw.randrange(100)
        scheduler = SchedulerStats(
            num_running_reqs=1 + draw.randrange(9),
            kv_cache_usage=draw.random(),
            prefix_cache_stats=PrefixCacheStats(queries=queries, hits=queries // 2),
        )
        if index % 3 == 0:
            scheduler.connector_prefix_cache_stats = PrefixCacheStats(queries=1)
        yield scheduler, iteration if draw.random() < 0.9 else None


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """All values by their series, without those that say when one was made."""
    return {
        sample.name + "".join(f" {each}" for each in sample.labels.values() if each): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
