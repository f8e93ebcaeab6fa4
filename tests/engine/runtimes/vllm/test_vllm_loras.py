"""LoRAs of a real language model: beside one another, equal to merged models, parked, dropped."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.errors import InsufficientCapacity, InvalidRequest, LoadFailed, ModelNotFound
from engine.events import Document
from engine.memory.host_memory import HostMemory
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.starters.registry import ensure_starter
from tests.engine.runtimes.vllm.peft_files import MODULES, merge, write_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

EVERYWHERE = (*MODULES, "embed_tokens", "lm_head")
NAMES = ("one", "two", "three", "everywhere")
PROMPT = "the quick brown fox jumps over the lazy dog"
TOLERANCE = 1e-3
"""Of log-probabilities in float32: a merged weight is rounded otherwise than a sum of products."""


@dataclass
class Served:
    """The model with its LoRAs, and the answers of models in which one was merged."""

    runtime: VllmRuntime
    model: ModelConfig
    loaded: VllmModel
    folder: Path
    base: Path
    host: HostMemory
    merged: dict[str | None, tuple[str, list[float]]]

    async def answer(self, adapter: str | None, prompt: str = PROMPT) -> tuple[str, list[float]]:
        return await answer(self.runtime, self.model, self.loaded, adapter, prompt)

    async def check_all(self) -> None:
        """All at once: each answers as its merged model, and the base as without LoRAs."""
        names: list[str | None] = [None, *NAMES, None]
        answers = await asyncio.gather(*(self.answer(name) for name in names))
        for name, (text, numbers) in zip(names, answers, strict=True):
            expected, expected_numbers = self.merged[name]
            assert text == expected, name
            assert numbers == pytest.approx(expected_numbers, abs=TOLERANCE), name


async def answer(
    runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    adapter: str | None = None,
    prompt: str = PROMPT,
    **more: Any,
) -> tuple[str, list[float]]:
    """The greedy text, and the log-probability of each of its tokens."""
    document = await run(runtime, model, loaded, adapter, prompt=prompt, logprobs=0, **more)
    choice = document["choices"][0]
    named = model.id if adapter is None else f"{model.id}:{adapter}"
    assert document["model"] == named
    return choice["text"], choice["logprobs"]["token_logprobs"]


async def run(
    runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    adapter: str | None = None,
    operation: TextOperation = TextOperation.COMPLETION,
    **body: Any,
) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_tokens": 12}
    if operation is TextOperation.COMPLETION:
        sampling["ignore_eos"] = True
    elif operation in (TextOperation.RESPONSES, TextOperation.TOKENIZE):
        sampling = {}
    request = TextRequest(
        model.id, operation, {**sampling, **body}, request_id="test", adapter=adapter
    )
    events = [event async for event in loaded.run(runtime.prepare(model, request))]
    assert isinstance(events[0], Document)
    document: dict[str, Any] = json.loads(events[0].body)
    return document


def model_at(source: Path | str, **options: Any) -> ModelConfig:
    settings = {"dtype": "float32", "max_model_len": 512, "kv_cache": "16MiB", "max_num_seqs": 16}
    return ModelConfig(id="llama", source=str(source), options={**settings, **options})


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    return loaded


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(
    vllm_runtime: VllmRuntime, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    root = tmp_path_factory.mktemp("loras")
    base = ensure_starter("tiny-llama", root / "cache")
    folder = root / "folder"
    write_adapter(folder / "one", base, seed=1)
    write_adapter(folder / "two", base, seed=2, rank=16, alpha=8, modules=("q_proj", "v_proj"))
    write_adapter(folder / "three", base, seed=3, rank=4, modules=("down_proj", "gate_proj"))
    write_adapter(root / "everywhere", base, seed=4, modules=EVERYWHERE)
    merged = {}
    for name in (None, *NAMES):
        source = base
        if name is not None:
            adapter = root / name if name == "everywhere" else folder / name
            source = merge(adapter, base, root / f"merged-{name}")
        plain = await load(vllm_runtime, model_at(source))
        merged[name] = await answer(vllm_runtime, model_at(source), plain)
        await vllm_runtime.unload(plain)
    assert len({text for text, _ in merged.values()}) == len(merged)
    host = HostMemory(2**30, pinned=False)
    context, vllm_runtime.context = vllm_runtime.context, replace(vllm_runtime.context, host=host)
    model = model_at(
        base,
        loras=str(folder),
        lora_sources={"everywhere": str(root / "everywhere")},
        max_loras=2,
        max_cpu_loras=3,
    )
    loaded = await load(vllm_runtime, model)
    yield Served(vllm_runtime, model, loaded, folder, base, host, merged)
    await vllm_runtime.unload(loaded)
    assert host.used_bytes == 0
    vllm_runtime.context = context


@pytest.fixture
def adapters_left(served: Served) -> Iterator[None]:
    yield
    for name in set(os.listdir(served.folder)) - set(NAMES):
        shutil.rmtree(served.folder / name)


async def test_each_answers_as_its_merged_model_before_and_after_a_park(served: Served) -> None:
    # Four LoRAs, of which two have a slot and three a place in host memory.
    await served.check_all()
    everything = {block.name for block in served.loaded.blocks()}
    for blocks in (everything, {"loras"}, {"kv_cache"}):
        await served.runtime.park(served.loaded, blocks)
        await served.runtime.wake(served.loaded, blocks)
        await served.check_all()
        # One that has its slot already: nothing but the park makes vLLM copy it again.
        await served.answer("one")
        await served.runtime.park(served.loaded, blocks)
        await served.runtime.wake(served.loaded, blocks)
        assert (await served.answer("one"))[0] == served.merged["one"][0]


async def test_a_row_without_a_lora_is_that_of_the_model(served: Served) -> None:
    # Both slots are taken, so the last of them holds a LoRA.
    names: list[str | None] = ["one", None, "two", None]
    answers = await asyncio.gather(*(served.answer(name) for name in names))
    assert [text for text, _ in answers] == [served.merged[name][0] for name in names]


async def test_chats_and_messages_and_responses_take_them(served: Served) -> None:
    ask = [{"role": "user", "content": PROMPT}]

    async def text(operation: TextOperation, adapter: str | None) -> str:
        body: dict[str, Any] = {"messages": ask}
        if operation is TextOperation.RESPONSES:
            body = {"input": PROMPT, "max_output_tokens": 12, "temperature": 0}
        given = (served.runtime, served.model, served.loaded, adapter, operation)
        document = await run(*given, **body)
        assert document["model"] == ("llama" if adapter is None else f"llama:{adapter}")
        return json.dumps(document.get("choices") or document.get("content") or document["output"])

    for operation in (TextOperation.CHAT, TextOperation.MESSAGES, TextOperation.RESPONSES):
        assert await text(operation, "one") != await text(operation, None)
    counted = await run(
        served.runtime, served.model, served.loaded, "one", TextOperation.TOKENIZE, prompt=PROMPT
    )
    assert counted["count"] > 0


async def test_the_slots_are_counted_to_the_byte(served: Served) -> None:
    estimated = {b.name: b.nbytes for b in served.runtime.estimate(served.model).blocks}
    measured = {b.name: b.nbytes for b in served.loaded.blocks()}
    assert measured["loras"] == estimated["loras"] > 0


async def test_host_memory_counts_those_that_are_kept(served: Served) -> None:
    adapters = served.loaded.adapters
    assert adapters is not None
    await served.answer("two")
    with_two = served.host.used_bytes
    await served.runtime.forget_lora(served.loaded, "two")
    file = served.folder / "two" / "adapter_model.safetensors"
    freed = with_two - served.host.used_bytes
    assert 0 < freed <= file.stat().st_size < freed + 10_000
    assert "two" not in adapters.names
    assert (await served.answer("two"))[0] == served.merged["two"][0]
    assert served.host.used_bytes == with_two


async def test_no_room_in_host_memory(served: Served) -> None:
    adapters = served.loaded.adapters
    assert adapters is not None
    for name in adapters.names:
        await served.runtime.forget_lora(served.loaded, name)
    taken = served.host.free_bytes
    served.host.reserve(taken)
    try:
        with pytest.raises(InsufficientCapacity, match="'one' has no room"):
            await served.answer("one")
    finally:
        served.host.unreserve(taken)
    assert (await served.answer("one"))[0] == served.merged["one"][0]


@pytest.mark.usefixtures("adapters_left")
async def test_another_lora_of_the_same_name_is_another(served: Served) -> None:
    folder = served.folder / "new"
    shutil.copytree(served.folder / "one", folder)
    long = " ".join([PROMPT] * 25)  # some blocks of the prefix cache
    expected = [await served.answer(name, long) for name in ("one", "three")]
    assert await served.answer("new", long) == expected[0]
    shutil.rmtree(folder)
    shutil.copytree(served.folder / "three", folder)
    assert (await served.answer("new", long))[1] == pytest.approx(expected[1][1], abs=TOLERANCE)


@pytest.mark.usefixtures("adapters_left")
async def test_one_that_goes_while_it_runs_harms_nobody(served: Served) -> None:
    folder = served.folder / "new"
    shutil.copytree(served.folder / "one", folder)
    from vllm import SamplingParams

    await served.answer("new")
    adapters = served.loaded.adapters
    assert adapters is not None
    # As after a closed stream: vLLM still steps it, and nobody holds the LoRA any more.
    left = served.loaded.llm.generate(
        PROMPT,
        SamplingParams(max_tokens=400, ignore_eos=True),
        "left",
        lora_request=adapters.requests["llama:new"],
    )
    await anext(left)
    await served.runtime.forget_lora(served.loaded, "new")
    shutil.rmtree(folder)
    await left.aclose()
    with pytest.raises(ModelNotFound):
        await served.answer("new")
    await served.check_all()


async def test_a_cancelled_wait_leaves_nothing(served: Served) -> None:
    adapters = served.loaded.adapters
    assert adapters is not None
    for name in adapters.names:
        await served.runtime.forget_lora(served.loaded, name)
    tasks = [asyncio.create_task(served.answer(name)) for name in NAMES]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in results] == [True, False] * 2
    await served.check_all()


@pytest.mark.usefixtures("adapters_left")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rank": 32}, "rank 32 is above the model's max_lora_rank, 16"),
        ({"use_dora": True}, "use_dora is not served"),
        ({"r": 4}, "has the rank 8, and adapter_config.json says 4"),
    ],
)
async def test_what_does_not_fit_is_refused_before_it_runs(
    served: Served, changed: dict[str, Any], words: str
) -> None:
    write_adapter(served.folder / "bad", served.base, **changed)
    with pytest.raises(InvalidRequest, match=words) as refused:
        await served.answer("bad")
    assert refused.value.param == "model"


@pytest.mark.usefixtures("adapters_left")
async def test_one_for_another_model_is_refused(served: Served, cache_dir: Path) -> None:
    other = ensure_starter("tiny-qwen", cache_dir)
    folder = write_adapter(served.folder / "bad", other, modules=("q_proj",))
    with pytest.raises(InvalidRequest, match=r"changes a weight .* of 192×192, .* is 256×256"):
        await served.answer("bad")
    model = model_at(served.base, lora_sources={"bad": str(folder)})
    with pytest.raises(LoadFailed, match=r"options\.lora_sources\.bad: .*256×256"):
        await served.runtime.load(model, lambda reason: None)


async def test_what_vllm_cannot_read_fails_its_request_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = served.loaded.adapters
    assert adapters is not None
    for name in adapters.names:
        await served.runtime.forget_lora(served.loaded, name)
    used = served.host.used_bytes

    def fail(*_args: Any) -> None:
        raise ValueError("expected target modules in /some/folder/of/ours")

    with monkeypatch.context() as patch:
        patch.setattr(adapters._manager, "_load_adapter", fail)
        with pytest.raises(InvalidRequest, match="does not fit the model: expected") as refused:
            await served.answer("one")
    assert "/some" not in refused.value.message
    assert served.host.used_bytes == used
    await served.check_all()
