"""A prefix cache that leaves with its KV cache for host memory, and comes back with it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.events import Frame
from engine.memory.host_memory import HostMemory
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.conftest import StarterDir
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.vllm.greedy import completion

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

MIB = 2**20
SIZES = {"max_model_len": 2048, "kv_cache": "64MiB"}
EVERYTHING = ("weights", "kv_cache", "workspace")
PREFIX = "the sea and the sky and the ships that go by at night " * 24
ANOTHER = "a wood, a hill, a road that nobody takes any more, and a house " * 22


@pytest.fixture(autouse=True)
def host(vllm_runtime: VllmRuntime) -> Iterator[HostMemory]:
    """Room for copies, all of which must be back in the end."""
    memory = HostMemory(256 * MIB, pinned=False)
    vllm_runtime.context = replace(vllm_runtime.context, host=memory)
    yield memory
    vllm_runtime.forget_prefixes()
    vllm_runtime.context = replace(vllm_runtime.context, host=None)
    assert memory.used_bytes == 0


@pytest.fixture
def model(make_model: MakeModel) -> ModelConfig:
    return make_model("kept", kv_host="64MiB", **SIZES)


async def load(runtime: VllmRuntime, model: ModelConfig) -> VllmModel:
    loaded = await runtime.load(model, lambda reason: None)
    assert isinstance(loaded, VllmModel)
    return loaded


@pytest_asyncio.fixture(loop_scope="session")
async def loaded(
    vllm_runtime: VllmRuntime, model: ModelConfig, host: HostMemory
) -> AsyncIterator[VllmModel]:
    made = await load(vllm_runtime, model)
    yield made
    if made.llm is not None:
        await vllm_runtime.unload(made)


async def asked(
    runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, prompt: str, **more: Any
) -> tuple[str, int]:
    """The greedy text, and the tokens of the prompt that the prefix cache had."""
    prepared = runtime.prepare(model, completion(model.id, prompt, max_tokens=16, **more))
    text = ""
    async for event in loaded.run(prepared):
        assert isinstance(event, Frame)
        data = event.data.removeprefix("data: ").strip()
        if data != "[DONE]":
            text += "".join(choice["text"] for choice in json.loads(data)["choices"])
    return text, prepared.usage.cached_tokens


async def swap(runtime: VllmRuntime, loaded: VllmModel) -> None:
    await runtime.park(loaded, EVERYTHING)
    await runtime.wake(loaded, EVERYTHING)


async def test_the_prefix_is_there_after_a_swap_with_the_same_text(
    vllm_runtime: VllmRuntime, make_model: MakeModel, host: HostMemory
) -> None:
    found = {}
    for kv_host in (None, "64MiB"):
        model = make_model("kept", **SIZES, **({"kv_host": kv_host} if kv_host else {}))
        loaded = await load(vllm_runtime, model)
        cold, none = await asked(vllm_runtime, model, loaded, PREFIX)
        warm, most = await asked(vllm_runtime, model, loaded, PREFIX)
        assert (none, warm) == (0, cold) and most > 500
        masters = loaded.host_bytes
        await vllm_runtime.park(loaded, EVERYTHING)
        assert (host.used_bytes > masters) == bool(kv_host)
        assert host.spare_bytes() == ({"kept": host.used_bytes - masters} if kv_host else {})
        await vllm_runtime.wake(loaded, EVERYTHING)
        assert host.used_bytes == masters
        text, cached = await asked(vllm_runtime, model, loaded, PREFIX)
        assert text == cold
        found[kv_host] = (cached, most)
        await vllm_runtime.unload(loaded)
        vllm_runtime.forget_prefixes()
    assert found[None][0] == 0
    assert found["64MiB"][0] == found["64MiB"][1]


async def test_the_bytes_come_back_and_not_only_the_hashes(
    vllm_runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests of the text would see nothing if the model did not look at its prefix."""
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    prefixes = loaded.client.prefixes
    assert prefixes is not None
    await vllm_runtime.park(loaded, EVERYTHING)
    monkeypatch.setattr(prefixes, "_copy", lambda *args, **more: None)
    await vllm_runtime.wake(loaded, EVERYTHING)
    text, cached = await asked(vllm_runtime, model, loaded, PREFIX)
    assert cached > 0 and text != cold


async def test_twenty_swaps_keep_two_prefixes_and_no_byte_more(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, host: HostMemory
) -> None:
    expected = [await asked(vllm_runtime, model, loaded, each) for each in (PREFIX, ANOTHER)]
    kept = []
    for round_ in range(20):
        await vllm_runtime.park(loaded, EVERYTHING)
        kept.append(sum(host.spare_bytes().values()))
        await vllm_runtime.wake(loaded, EVERYTHING)
        prompt = (PREFIX, ANOTHER)[round_ % 2]
        text, cached = await asked(vllm_runtime, model, loaded, prompt)
        assert (text, cached > 500) == (expected[round_ % 2][0], True)
    assert max(kept) < kept[0] * 1.2  # the blocks with the ends of answers


async def test_what_is_kept_is_the_most_recently_used(
    vllm_runtime: VllmRuntime, make_model: MakeModel, host: HostMemory
) -> None:
    model = make_model("small", kv_host="64MiB", **SIZES)
    loaded = await load(vllm_runtime, model)
    prefixes = loaded.client.prefixes
    assert prefixes is not None
    await asked(vllm_runtime, model, loaded, PREFIX)
    await swap(vllm_runtime, loaded)
    await asked(vllm_runtime, model, loaded, ANOTHER)
    await asked(vllm_runtime, model, loaded, PREFIX)
    pool = loaded.client.core.scheduler.kv_cache_manager.block_pool
    both = len(pool.cached_block_hash_to_block)
    prefixes._limit_bytes = (both // 2 + 1) * prefixes.block_bytes
    await vllm_runtime.park(loaded, EVERYTHING)
    assert 0 < sum(host.spare_bytes().values()) <= prefixes._limit_bytes
    await vllm_runtime.wake(loaded, EVERYTHING)
    _, recent = await asked(vllm_runtime, model, loaded, PREFIX)
    _, older = await asked(vllm_runtime, model, loaded, ANOTHER)
    assert recent > 500 > 300 > older
    await vllm_runtime.unload(loaded)


async def test_others_that_want_the_room_get_it_and_the_cache_is_cold(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, host: HostMemory
) -> None:
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    await vllm_runtime.park(loaded, EVERYTHING)
    assert host.free_bytes == host.budget_bytes - loaded.host_bytes
    slab = host.allocate(host.free_bytes)
    assert host.spare_bytes() == {}
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert await asked(vllm_runtime, model, loaded, PREFIX) == (cold, 0)
    # There is no room for it now, and it takes none from what others have kept.
    other = host.make_spare("other", [slab])
    await swap(vllm_runtime, loaded)
    assert await asked(vllm_runtime, model, loaded, PREFIX) == (cold, 0)
    assert host.take_spare(other) == [slab]
    host.free(slab)


@pytest.mark.parametrize("step", ["out", "back", "enter"])
async def test_a_failure_half_way_leaves_a_cold_cache_and_no_byte(
    vllm_runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    host: HostMemory,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    prefixes = loaded.client.prefixes
    assert prefixes is not None
    if step == "enter":
        pool = loaded.client.core.scheduler.kv_cache_manager.block_pool
        enter, left = pool._insert_block_hash, [3]

        def broken_entry(*args: Any, **more: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("broken")
            enter(*args, **more)

        monkeypatch.setattr(pool, "_insert_block_hash", broken_entry)
    else:
        ranges = prefixes._ranges

        def broken(slabs: Any, counts: Any, pairs: Any) -> Iterator[Any]:
            yield next(iter(ranges(slabs, counts, pairs)))
            raise RuntimeError("broken")

        if step == "back":
            await vllm_runtime.park(loaded, EVERYTHING)
        monkeypatch.setattr(prefixes, "_ranges", broken)
    if step != "back":
        await vllm_runtime.park(loaded, EVERYTHING)
    if step == "out":
        assert host.used_bytes == loaded.host_bytes
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert host.used_bytes == loaded.host_bytes
    monkeypatch.undo()
    pool = loaded.client.core.scheduler.kv_cache_manager.block_pool
    assert len(pool.cached_block_hash_to_block) == 0
    assert await asked(vllm_runtime, model, loaded, PREFIX) == (cold, 0)
    await swap(vllm_runtime, loaded)
    text, cached = await asked(vllm_runtime, model, loaded, PREFIX)
    assert (text, cached > 500) == (cold, True)


async def test_a_wake_that_fails_keeps_them_for_the_next(
    vllm_runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    await vllm_runtime.park(loaded, EVERYTHING)

    def full(names: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(loaded.memory, "wake", full)
    with pytest.raises(Exception, match="wake"):
        await vllm_runtime.wake(loaded, EVERYTHING)
    monkeypatch.undo()
    await vllm_runtime.wake(loaded, EVERYTHING)
    text, cached = await asked(vllm_runtime, model, loaded, PREFIX)
    assert (text, cached > 500) == (cold, True)


async def test_a_salt_still_keeps_callers_apart(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel
) -> None:
    await asked(vllm_runtime, model, loaded, PREFIX, cache_salt="one")
    await swap(vllm_runtime, loaded)
    assert (await asked(vllm_runtime, model, loaded, PREFIX, cache_salt="two"))[1] == 0
    assert (await asked(vllm_runtime, model, loaded, PREFIX))[1] == 0
    assert (await asked(vllm_runtime, model, loaded, PREFIX, cache_salt="one"))[1] > 500


@pytest.mark.parametrize("names", [(), ("kv_cache",), EVERYTHING])
async def test_a_reload_finds_them_again(
    vllm_runtime: VllmRuntime,
    model: ModelConfig,
    loaded: VllmModel,
    host: HostMemory,
    names: tuple[str, ...],
) -> None:
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    if names:
        await vllm_runtime.park(loaded, names)
    await vllm_runtime.unload(loaded)
    assert host.spare_bytes() == {model.id: host.used_bytes}
    again = await load(vllm_runtime, model)
    assert host.used_bytes == again.host_bytes
    text, cached = await asked(vllm_runtime, model, again, PREFIX)
    assert (text, cached > 500) == (cold, True)
    await vllm_runtime.unload(again)


@pytest.mark.parametrize("changed", ["files", "options", "size"])
async def test_a_reload_with_something_else_starts_cold(
    vllm_runtime: VllmRuntime,
    make_model: MakeModel,
    model: ModelConfig,
    loaded: VllmModel,
    host: HostMemory,
    changed: str,
) -> None:
    cold, _ = await asked(vllm_runtime, model, loaded, PREFIX)
    await vllm_runtime.unload(loaded)
    if changed == "files":
        for path in vllm_runtime.weight_files(model):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    elif changed == "options":
        model = make_model("kept", kv_host="64MiB", **{**SIZES, "max_model_len": 1536})
    else:
        model = make_model("kept", kv_host="64MiB", **{**SIZES, "kv_cache": "32MiB"})
    again = await load(vllm_runtime, model)
    assert await asked(vllm_runtime, model, again, PREFIX) == (cold, 0)
    assert host.used_bytes == again.host_bytes
    await vllm_runtime.unload(again)


async def test_a_smaller_kv_cache_takes_what_fits(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, host: HostMemory
) -> None:
    prompt = PREFIX + ANOTHER
    cold, _ = await asked(vllm_runtime, model, loaded, prompt)
    await vllm_runtime.park(loaded, EVERYTHING)
    prefixes = loaded.client.prefixes
    assert prefixes is not None and prefixes.kept is not None
    prefixes._block_count = len(prefixes.kept.blocks) // 2
    await vllm_runtime.wake(loaded, EVERYTHING)
    assert host.used_bytes == loaded.host_bytes
    text, cached = await asked(vllm_runtime, model, loaded, prompt)
    assert text == cold and cached > 0


def write_gemma(tokenizer: Path, folder: Path) -> None:
    """Random layers with a sliding window, and some without."""
    import torch
    import transformers

    folder.mkdir()
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=192,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(3)
        model = transformers.Gemma3ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as initialised, every token would be as likely as any other
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


async def test_layers_with_a_sliding_window_have_groups_of_their_own(
    vllm_runtime: VllmRuntime, host: HostMemory, starter_dir: StarterDir, tmp_path: Path
) -> None:
    folder = tmp_path / "gemma"
    write_gemma(starter_dir("tiny-qwen"), folder)
    options = {"dtype": "float32", "kv_host": "64MiB", "max_num_seqs": 4, **SIZES}
    model = ModelConfig(id="gemma", source=str(folder), options=options)
    loaded = await load(vllm_runtime, model)
    prefixes = loaded.client.prefixes
    assert prefixes is not None
    cold = [await asked(vllm_runtime, model, loaded, each) for each in (PREFIX, ANOTHER)]
    warm = [await asked(vllm_runtime, model, loaded, each) for each in (PREFIX, ANOTHER)]
    await vllm_runtime.park(loaded, EVERYTHING)
    assert prefixes.kept is not None
    assert len({each.hashes[0][-4:] for each in prefixes.kept.blocks}) > 1
    await vllm_runtime.wake(loaded, EVERYTHING)
    again = [await asked(vllm_runtime, model, loaded, each) for each in (PREFIX, ANOTHER)]
    assert again == warm and warm[0][1] > 500
    assert [text for text, _ in again] == [text for text, _ in cold]
    await vllm_runtime.unload(loaded)


@pytest.mark.parametrize(
    ("kind", "caches", "why"),
    [
        ("MambaSpec", True, "layers of the kind MambaSpec"),
        ("RSWASpec", True, "layers of the kind RSWASpec"),
        ("FullAttentionSpec", False, "no prefix cache"),
    ],
)
async def test_a_model_of_which_none_can_be_kept_is_refused_by_name(
    vllm_runtime: VllmRuntime,
    model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    host: HostMemory,
    kind: str,
    caches: bool,
    why: str,
) -> None:
    from vllm.v1 import kv_cache_interface

    from engine.runtimes.vllm import kept_prefixes

    spec = object.__new__(getattr(kv_cache_interface, kind))
    monkeypatch.setattr(kept_prefixes, "iter_layer_specs", lambda _: [spec])
    if not caches:
        init = kept_prefixes.KeptPrefixes.__init__

        def without(self: Any, *args: Any, **more: Any) -> None:
            init(self, *args, **{**more, "caches_prefixes": False})

        monkeypatch.setattr(kept_prefixes.KeptPrefixes, "__init__", without)
    with pytest.raises(LoadFailed, match=rf"options\.kv_host: .*{why}"):
        await load(vllm_runtime, model)
    assert host.used_bytes == 0


async def test_a_model_that_does_not_write_is_refused_when_the_file_is_read() -> None:
    model = ModelConfig(
        id="e", task="embed", source="starter:tiny-embed", options={"kv_host": "1GiB"}
    )
    with pytest.raises(ValueError, match=r"options\.kv_host: .*'embed'"):
        VllmRuntime.check(model)


async def test_another_request_in_the_core_does_not_stop_an_unload(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, host: HostMemory
) -> None:
    await asked(vllm_runtime, model, loaded, PREFIX)
    events = loaded.run(vllm_runtime.prepare(model, completion(model.id, ANOTHER, max_tokens=400)))
    await anext(events)
    await vllm_runtime.unload(loaded)
    assert host.spare_bytes() == {}
    with contextlib.suppress(Exception):  # its engine has gone
        await events.aclose()
