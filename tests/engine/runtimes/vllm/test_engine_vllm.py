"""The engine on real vLLM: two models, one budget that holds one of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import Conflict, InsufficientCapacity, LoadFailed
from engine.events import Document
from engine.requests import TextOperation, TextRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.scheduling.ledger import Change, LedgerRecord
from engine.starters.registry import ensure_starter
from engine.status import ModelState
from server.app import create_app
from server.settings import ServerSettings
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.vllm.call_count import counted_calls, post, wait_for_the_loop
from tests.engine.runtimes.vllm.greedy import PROMPTS, completion, text_of

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

WAIT_S = 120.0
MAX_TOKENS = 32

MakeEngine = Callable[..., Awaitable[Engine]]


class RunningRuntime(VllmRuntime):
    """The session's runtime, lent to an engine that must not start or stop it again."""

    def __init__(self, runtime: VllmRuntime, context: RuntimeContext) -> None:
        self.__dict__.update(runtime.__dict__)
        self.context = context

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        self.forget_prefixes()  # they are in the memory of this engine


@pytest_asyncio.fixture(loop_scope="session")
async def make_engine(
    vllm_runtime: VllmRuntime, cache_dir: Path, tmp_path: Path
) -> AsyncIterator[MakeEngine]:
    """An engine that is ready, on the runtime that all tests of this process share."""
    engines: list[Engine] = []

    async def make(*models: ModelConfig, memory: str, **settings: object) -> Engine:
        config = EngineConfig(
            device="cpu",
            memory=memory,
            state_dir=tmp_path / "state",
            cache_dir=cache_dir,
            models=models,
            **settings,
        )
        engine = Engine(
            config,
            device=vllm_runtime.context.device,
            runtimes={"vllm": partial(RunningRuntime, vllm_runtime)},
        )
        await engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.stop()


async def text(engine: Engine, request: TextRequest) -> str:
    """The text of a streamed completion, through the whole engine."""
    session = await engine.open(request)
    return "".join([text_of(frame) async for frame in session.events()])


def assert_adds_up(engine: Engine) -> None:
    """What `GET /v1/engine` shows is consistent in itself."""
    status = engine.status()
    ledger = status.ledger
    assert ledger.granted_bytes == sum(entry.nbytes for entry in ledger.entries)
    assert ledger.free_bytes == ledger.capacity_bytes - ledger.granted_bytes
    by_owner: Counter[str] = Counter()
    for entry in ledger.entries:
        if entry.kind != "lease":
            by_owner[entry.owner] += entry.nbytes
    for model in status.models:
        assert by_owner[model.id] == model.device_bytes
        if model.state is ModelState.RESIDENT:
            assert model.device_bytes == sum(block.nbytes for block in model.blocks)


def overgrants(engine: Engine) -> list[LedgerRecord]:
    """Every time that granted bytes grew above capacity."""
    return [
        record
        for record in engine._ledger.history
        if record.change is Change.GROW and record.granted_bytes > record.capacity_bytes
    ]


async def bare_texts(*folders: Path) -> list[list[str]]:
    """The answers of plain vLLM to the same prompts, for each model."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(
            "-m",
            "tests.engine.runtimes.vllm.bare_vllm",
            str(MAX_TOKENS),
            ",".join(map(str, folders)),
            *PROMPTS,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors[-2000:].decode()
    texts: list[list[str]] = json.loads(output.splitlines()[-1])
    return texts


async def test_two_models_take_turns_in_room_for_one(
    make_engine: MakeEngine, make_model: MakeModel, vllm_runtime: VllmRuntime
) -> None:
    """Sixty streams, eight at a time, alternating; every text is plain vLLM's."""
    llama, qwen = make_model("llama"), make_model("qwen", "tiny-qwen")
    texts = await bare_texts(*(vllm_runtime._folder(model) for model in (llama, qwen)))
    expected = dict(zip(("llama", "qwen"), texts, strict=True))
    engine = await make_engine(llama, qwen, memory="140MiB")
    before = psutil.Process().memory_info().rss
    turnstile = asyncio.Semaphore(8)

    async def one(index: int) -> None:
        model = (llama, qwen)[index % 2]
        which = (index // 2) % len(PROMPTS)
        request = completion(model.id, PROMPTS[which], max_tokens=MAX_TOKENS)
        async with turnstile:
            assert await text(engine, request) == expected[model.id][which]
        assert_adds_up(engine)

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        for index in range(60):
            group.create_task(one(index))
    assert not overgrants(engine)
    assert engine.status().ledger.peak_granted_bytes <= 140 << 20
    loads = engine.metrics.get_sample_value(
        "roundhouse_loads_total", {"model": "qwen", "outcome": "ok"}
    )
    assert loads  # both really were on the device, one after the other
    for model in (llama, qwen):
        await engine.unload(model.id)
        assert_adds_up(engine)
    assert engine.status().ledger.granted_bytes == 0
    assert psutil.Process().memory_info().rss <= before * 1.05


async def test_a_hundred_streams_and_one_that_leaves(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    model = make_model("llama")
    engine = await make_engine(model, memory="512MiB")
    alone = [
        await text(engine, completion("llama", prompt, max_tokens=MAX_TOKENS)) for prompt in PROMPTS
    ]
    sessions = await asyncio.gather(
        *(
            engine.open(completion("llama", PROMPTS[i % len(PROMPTS)], max_tokens=MAX_TOKENS + 1))
            for i in range(100)
        )
    )
    assert engine.model_status("llama").leases == 100
    assert_adds_up(engine)

    async def read(index: int) -> str:
        return "".join([text_of(frame) async for frame in sessions[index].events()])

    await sessions[0].close()
    texts = await asyncio.gather(*(read(i) for i in range(1, 100)))
    for index, got in enumerate(texts, start=1):
        assert got.startswith(alone[index % len(PROMPTS)])
    assert engine.model_status("llama").leases == 0


async def test_a_client_that_leaves_frees_what_it_held(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(make_model("llama"), memory="512MiB")
    session = await engine.open(completion("llama", "hello", max_tokens=480))
    loaded = engine._residency.loaded["llama"]
    assert isinstance(loaded, VllmModel)

    async def usage() -> float:
        call = loaded.client.call(lambda core: core.scheduler.kv_cache_manager.usage)
        return float(await asyncio.wrap_future(call))

    assert await usage() > 0
    frames = session.events()
    await anext(frames)
    await frames.aclose()
    async with asyncio.timeout(WAIT_S):
        while await usage() > 0:
            pass
    assert engine.model_status("llama").leases == 0
    await engine.unload("llama")


async def test_a_running_stream_is_never_cut_by_another_model(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(
        make_model("llama"), make_model("qwen", "tiny-qwen"), memory="140MiB", max_overtake_s=0
    )
    expected = await text(engine, completion("llama", "hello", max_tokens=300))
    session = await engine.open(completion("llama", "hello", max_tokens=300))
    other = asyncio.ensure_future(text(engine, completion("qwen", "hello", max_tokens=4)))
    with pytest.raises(Conflict):
        await engine.unload("llama")
    assert "".join([text_of(frame) async for frame in session.events()]) == expected
    async with asyncio.timeout(WAIT_S):
        assert await other
    assert engine.model_status("llama").state is ModelState.PARKED


async def test_a_broken_checkpoint_fails_alone(
    make_engine: MakeEngine, make_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    broken = ModelConfig(id="broken", source=str(tmp_path / "broken"))
    missing = ModelConfig(id="missing", source=str(tmp_path / "missing"))
    engine = await make_engine(make_model("llama"), broken, missing, memory="512MiB")
    good, bad, gone = await asyncio.gather(
        text(engine, completion("llama", "hello", max_tokens=4)),
        text(engine, completion("broken", "hello")),
        text(engine, completion("missing", "hello")),
        return_exceptions=True,
    )
    assert isinstance(good, str) and good
    assert isinstance(bad, LoadFailed) and "checkpoint" in str(bad)
    assert isinstance(gone, LoadFailed) and "no folder" in str(gone)
    assert engine.model_status("broken").last_error == str(bad)
    assert_adds_up(engine)


async def test_a_model_that_can_never_fit_is_named_at_the_start(
    make_engine: MakeEngine,
    make_model: MakeModel,
    cache_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ensure_starter("tiny-llama", cache_dir)
    remote = ModelConfig(id="remote", source="nobody/has-this")
    fits, large = make_model("fits"), make_model("large", kv_cache="128MiB")
    with caplog.at_level(logging.DEBUG, "engine.engine"):
        engine = await make_engine(remote, large, fits, memory="128MiB")
        await asyncio.gather(*engine._preloading.tasks)
    (said,) = (each for each in caplog.records if "cannot" in each.message)
    with pytest.raises(InsufficientCapacity) as refused:
        await engine.load("large")
    needs = refused.value.message.partition("'large' ")[2].removesuffix(".")
    assert needs.startswith("needs 1") and needs.endswith("at most 128.0 MiB can be freed")
    assert (said.levelname, said.message) == (
        "WARNING",
        f"large cannot be served: {needs} for it",
    )
    assert engine.model_status("fits").estimated_bytes is not None
    assert engine.model_status("remote").estimated_bytes is None


async def test_a_dead_engine_is_replaced_on_the_next_request(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(make_model("llama"), memory="512MiB")
    expected = await text(engine, completion("llama", "hello"))
    loaded = engine._residency.loaded["llama"]
    assert isinstance(loaded, VllmModel)

    def fail() -> None:
        raise RuntimeError("the device is on fire")

    loaded.client.core.step_fn = fail
    with pytest.raises(Exception, match="on fire"):
        await text(engine, completion("llama", "hello"))
    assert await text(engine, completion("llama", "hello")) == expected
    assert engine._residency.loaded["llama"] is not loaded


async def test_measurements_replace_estimates_and_are_remembered(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    model = make_model("llama")
    first = await make_engine(model, memory="512MiB")
    await first.load("llama")
    measured = first.model_status("llama")
    await first.stop()
    second = await make_engine(model, memory="512MiB")
    assert second.model_status("llama").estimated_bytes is None
    await second.load("llama")
    remembered = second._residency._estimates
    assert remembered is not None
    estimate = remembered.get(model)
    assert estimate is not None
    assert estimate.nbytes == measured.device_bytes


async def test_both_documents_and_streams_tell_their_times(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(make_model("llama"), memory="512MiB")
    cold = await engine.open(completion("llama", "hello", max_tokens=4, stream=False))
    assert cold.timings.load_ms > 10
    warm = await engine.open(completion("llama", "hello", max_tokens=4))
    assert warm.timings.load_ms == 0
    assert warm.timings.run_ms > 0
    await warm.close()
    assert engine.model_status("llama").leases == 0


async def test_tokenize_needs_no_lease_for_longer_than_it_runs(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(make_model("llama"), memory="512MiB")
    request = TextRequest("llama", TextOperation.TOKENIZE, {"prompt": "hello"}, "test")
    session = await engine.open(request)
    assert engine.model_status("llama").leases == 0
    assert session.first


async def test_what_a_model_writes_in_place_of_a_call_is_no_error_of_the_server(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    await make_engine(make_model("llama"), memory="512MiB")
    parser = logging.getLogger("vllm.tool_parsers.llama_tool_parser")
    assert parser.name in sys.modules or find_spec(parser.name) is not None
    assert not parser.isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("path", "token_calls", "request_calls"),
    [("/v1/chat/completions", 102, 1340), ("/v1/completions", 99, 1210)],
)
async def test_what_a_token_and_a_request_cost(
    make_engine: MakeEngine,
    make_model: MakeModel,
    vllm_runtime: VllmRuntime,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    token_calls: int,
    request_calls: int,
) -> None:
    """Calls of Python functions on the event loop, whose number no other process changes.

    Lower the numbers when a change makes them smaller.
    """
    engine = await make_engine(make_model("llama"), memory="1GiB")
    app = create_app(engine, ServerSettings())
    monkeypatch.setattr(VllmModel, "_is_parsed", lambda *_: True)  # an event for each token
    wait_for_the_loop(monkeypatch)
    # The steps are recorded once, at the end, however long they take.
    monkeypatch.setattr("engine.runtimes.vllm.metrics.RECORDED_S", WAIT_S)

    async def calls(tokens: int) -> Counter[str]:
        body = {"model": "llama", "stream": True, "max_tokens": tokens, "ignore_eos": True}
        if path == "/v1/completions":
            body["prompt"] = "hello"
        else:
            body["messages"] = [{"role": "user", "content": "hello"}]
        with counted_calls() as count:
            sent = await post(app, path, body)
        assert sent[0]["status"] == 200, sent
        assert len(sent) >= tokens
        return count

    async def fewest(tokens: int) -> Counter[str]:
        return min([await calls(tokens) for _ in range(4)], key=Counter.total)

    await calls(8)
    few, many = await fewest(16), await fewest(80)
    token = (many.total() - few.total()) / 64
    request = few.total() - 16 * token
    assert token <= 1.1 * token_calls, table(many - few, 64)
    assert request <= 1.1 * request_calls, table(few, 1)


@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_are_counted_as_in_the_usage_of_the_answer(
    make_engine: MakeEngine, make_model: MakeModel, n: int
) -> None:
    engine = await make_engine(make_model("llama"), memory="1GiB")
    body = {"prompt": "hello there", "max_tokens": 8, "n": n, "seed": 1}
    session = await engine.open(TextRequest("llama", TextOperation.COMPLETION, body, "whole"))
    (event,) = [each async for each in session.events()]
    assert isinstance(event, Document)
    usage = json.loads(event.body)["usage"]
    counted = session.usage
    assert counted.input_tokens == usage["prompt_tokens"] > 0
    assert counted.output_tokens == usage["completion_tokens"] > 0


async def test_a_stream_that_is_closed_has_counted_what_it_took(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = await make_engine(make_model("llama"), memory="1GiB")
    body = {"prompt": "hello there", "max_tokens": 200, "stream": True, "ignore_eos": True}
    session = await engine.open(TextRequest("llama", TextOperation.COMPLETION, body, "stream"))
    events = session.events()
    for _ in range(3):
        await anext(events)
    await events.aclose()
    assert session.usage.input_tokens > 0
    assert 3 <= session.usage.output_tokens < 200


def table(count: Counter[str], divisor: int) -> str:
    """The most frequent calls, for whoever has to find what has grown."""
    rows = [f"{each / divisor:8.2f} {name}" for name, each in count.most_common(60)]
    return "\n".join(rows)


async def test_a_kept_prefix_is_counted_shown_and_found_after_a_swap(
    make_engine: MakeEngine, make_model: MakeModel, vllm_runtime: VllmRuntime
) -> None:
    sizes = {"max_model_len": 1024, "kv_host": "16MiB"}
    llama, qwen = make_model("llama", **sizes), make_model("qwen", "tiny-qwen", **sizes)
    engine = await make_engine(llama, qwen, memory="140MiB", host_memory="256MiB")
    prompt = "the sea and the sky and the ships that go by at night " * 24

    async def asked(model: ModelConfig) -> tuple[str, int]:
        session = await engine.open(completion(model.id, prompt, max_tokens=8))
        told = "".join([text_of(frame) async for frame in session.events()])
        return told, session.usage.cached_tokens

    def shown(model: ModelConfig) -> float | None:
        name = "roundhouse_host_prefix_bytes"
        return engine.metrics.get_sample_value(name, {"model": model.id})

    cold, none = await asked(llama)
    assert none == 0 and engine.status().host.prefix_bytes == {}
    for _ in range(3):
        await asked(qwen)
        host = engine.status().host
        assert set(host.prefix_bytes) == {"llama"}
        assert shown(llama) == host.prefix_bytes["llama"] > 0
        masters = sum(model.host_bytes for model in engine.status().models)
        assert host.used_bytes == masters + host.prefix_bytes["llama"]
        assert engine._residency.host_free_bytes() == host.budget_bytes - masters
        told, cached = await asked(llama)
        assert (told, cached > 500) == (cold, True)
        assert set(engine.status().host.prefix_bytes) == {"qwen"}
        assert_adds_up(engine)
