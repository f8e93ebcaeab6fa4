"""Fallbacks: who is tried, after which errors, and what the caller is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import (
    BudgetExceeded,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    OutOfDeviceMemory,
    ProviderBusy,
    ProviderFailed,
    QueueTimeout,
    RuntimeFailed,
)
from engine.events import Document, Event, Frame, Progress
from engine.requests import SchedulingOptions, TextOperation, TextRequest
from engine.runtimes.registry import REGISTRY
from tests.server.fake import DEVICE_BYTES, FakeRuntime, fake_engine

MODELS: list[dict[str, Any]] = [
    {"id": "first", "fallbacks": ["second", "third"], "max_wait": 0.05},
    {"id": "second", "fallbacks": ["third", "first"]},
    {"id": "third"},
    {"id": "broken", "fallbacks": ["third"], "options": {"error": "the file is torn"}},
    {"id": "big", "fallbacks": ["broken"], "options": {"nbytes": 10 * DEVICE_BYTES}},
    {"id": "alone"},
]
EXAMPLES = {"model": "alone", "simple": ["hi"], "hard": ["prove it"], "weight": 1}
ROUTES: list[dict[str, Any]] = [
    {"id": "auto", "choose": ["broken", "alone"]},
    {"id": "taught", "choose": ["third"], "complexity": {"examples": EXAMPLES}},
    {"id": "untaught", "choose": ["third"], "complexity": {
        "examples": {**EXAMPLES, "model": "big"}}},
]  # fmt: skip


class World:
    """A real engine whose models do what a test says of them."""

    def __init__(self, folder: Path) -> None:
        self.runtime = FakeRuntime()
        self.runtime.answer = self._answer
        self.does: dict[str, list[Exception | asyncio.Event | None]] = {}
        """What the next runs of a model do: fail, or wait. Then it answers."""
        self.asked: list[str] = []
        models = [{"runtime": "fake", "source": "none", **each} for each in MODELS]
        self.engine: Engine = fake_engine(self.runtime, folder, models=models, routes=ROUTES)

    async def _answer(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.operation is TextOperation.EMBEDDINGS:
            vectors = [[float("prove" in text), 1.0] for text in request.body["input"]]
            data = [{"embedding": vector} for vector in vectors]
            yield Document(json.dumps({"data": data}).encode())
            return
        self.asked.append(request.model)
        yield Progress(0.1)
        plan = self.does.get(request.model)
        todo = plan.pop(0) if plan else None
        if isinstance(todo, Exception):
            raise todo
        yield Frame(f"of {request.model}")
        if todo is not None:
            await todo.wait()

    async def ask(self, model: str, **scheduling: Any) -> list[str]:
        """The frames of an answer."""
        session = await self.engine.open(request(model, **scheduling))
        self.session = session
        return [each.data async for each in session.events() if isinstance(each, Frame)]


def request(model: str, **scheduling: Any) -> TextRequest:
    return TextRequest(model, TextOperation.CHAT, {}, "r", SchedulingOptions(**scheduling))


async def until(ready: Callable[[], object], waits: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(10):
        while not ready():
            await asyncio.wait([waits], timeout=0.01)
            assert not waits.done()


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None
) -> AsyncIterator[World]:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    world = World(tmp_path)
    await world.engine.start()
    await world.engine.load("first")  # a load may take longer than its `max_wait`
    yield world
    assert world.engine.status().ledger.granted_bytes <= DEVICE_BYTES
    assert [model.leases for model in world.engine.status().models if model.leases] == []
    await world.engine.stop()


FAILURES = [
    RuntimeFailed("it broke"),
    OutOfDeviceMemory("no room"),
    ProviderBusy("later", retry_after_s=3),
    LoadFailed("gone"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: error.code)
async def test_the_next_model_answers_where_one_fails_with_nothing_given(
    world: World, error: Exception
) -> None:
    world.does["first"] = [error, error]  # the second try after a lack of memory fails as well
    assert await world.ask("first") == ["of second"]
    assert world.session.model.id == "second"
    assert [(each.model, each.code) for each in world.session.attempts] == [
        ("first", error.code)  # type: ignore[attr-defined]
    ]


async def test_a_lack_of_memory_is_tried_again_alone_before_another_model(world: World) -> None:
    world.does["first"] = [OutOfDeviceMemory("no room")]
    assert await world.ask("first") == ["of first"]
    assert world.asked == ["first", "first"]


async def test_a_failed_load_and_a_model_too_large_pass_on(world: World) -> None:
    assert await world.ask("big") == ["of third"]
    assert [each.code for each in world.session.attempts] == [
        "insufficient_capacity",
        "model_load_failed",
    ]


async def test_nothing_is_tried_after_the_first_frame(world: World) -> None:
    async def breaks(request: TextRequest) -> AsyncGenerator[Event, None]:
        world.asked.append(request.model)
        yield Frame("begun")
        raise RuntimeFailed("half-way")

    world.runtime.answer = breaks
    with pytest.raises(RuntimeFailed, match="half-way"):
        await world.ask("first")
    assert world.asked == ["first"]


async def test_a_wrong_request_is_nobody_elses(world: World) -> None:
    world.does["first"] = [InvalidRequest("no", param="seed")]
    with pytest.raises(InvalidRequest):
        await world.ask("first")
    assert world.asked == ["first"]


async def test_each_model_is_tried_once_and_the_last_error_tells_of_all(world: World) -> None:
    for name in ("first", "second", "third"):
        world.does[name] = [RuntimeFailed(f"{name} broke")]
    with pytest.raises(RuntimeFailed) as raised:
        await world.ask("second")
    assert world.asked == ["second", "third", "first"]
    assert raised.value.message == (
        "first broke Tried before: second (runtime_failed), third (runtime_failed)."
    )


async def test_a_busy_model_is_not_waited_for_longer_than_its_max_wait(world: World) -> None:
    busy = asyncio.Event()
    world.does["first"] = [busy]
    first = await world.engine.open(request("first", max_wait_s=60))
    assert await world.ask("first") == ["of second"]
    assert [each.code for each in world.session.attempts] == ["queue_timeout"]
    busy.set()
    await first.close()


async def test_the_patience_of_a_request_goes_before_that_of_the_model(world: World) -> None:
    busy = asyncio.Event()
    world.does["first"] = [busy]
    first = await world.engine.open(request("first", max_wait_s=60))
    waits = asyncio.create_task(world.ask("first", max_wait_s=60))
    await until(lambda: world.engine.status().queue, waits)
    busy.set()
    await first.close()
    assert await waits == ["of first"]


async def test_a_busy_model_is_waited_for_after_all_where_no_other_can(world: World) -> None:
    busy = asyncio.Event()
    world.does["first"] = [busy]
    world.does["second"] = [RuntimeFailed("it broke")]
    world.does["third"] = [RuntimeFailed("it broke")]
    first = await world.engine.open(request("first", max_wait_s=60))
    waits = asyncio.create_task(world.ask("first"))
    await until(lambda: len(world.asked) == 3 and world.engine.status().queue, waits)
    busy.set()
    await first.close()
    assert await waits == ["of first"]
    assert world.asked == ["first", "second", "third", "first"]


async def test_a_provider_that_failed_is_asked_once_more_where_no_other_can(world: World) -> None:
    world.does["first"] = [ProviderFailed("reset")]
    world.does["second"] = [ProviderBusy("full", retry_after_s=0.01)]
    world.does["third"] = [ProviderBusy("down", retry_after_s=3600)]
    assert await world.ask("first") == ["of first"]
    assert world.asked == ["first", "second", "third", "first"]
    for name in ("first", "second", "third"):
        world.does[name] = [ProviderFailed(f"reset {number}") for number in range(3)]
    with pytest.raises(ProviderFailed, match="reset 1"):
        await world.ask("first")
    assert world.asked[4:] == ["first", "second", "third"] * 2


async def test_the_deadline_of_the_request_holds_over_all_models(world: World) -> None:
    busy = asyncio.Event()
    for name in ("first", "second", "third"):
        world.does[name] = [busy]
    held = [
        await world.engine.open(request(name, max_wait_s=60))
        for name in ("first", "second", "third")
    ]
    with pytest.raises(QueueTimeout, match="Tried before: first"):
        await world.ask("first", timeout_s=0.2)
    busy.set()
    for session in held:
        await session.close()


async def test_a_loaded_fallback_serves_who_asks_for_a_loaded_model_only(world: World) -> None:
    await world.engine.unload("first")
    await world.engine.load("second")
    assert await world.ask("first", if_loaded_only=True) == ["of second"]


async def test_a_route_chooses_and_goes_on(world: World) -> None:
    assert await world.ask("auto") == ["of alone"]
    choice = await world.engine.route(request("auto:best"))
    assert set(choice.models) == {"broken", "alone"}
    resolved = await world.engine.resolve(request("auto"))
    assert resolved.model == choice.models[0]


async def test_a_route_compares_with_its_examples(world: World) -> None:
    async def score(route: str, text: str) -> float:
        body = {"messages": [{"role": "user", "content": text}]}
        asked = TextRequest(route, TextOperation.CHAT, body, "r")
        choice = await world.engine.route(asked)
        assert choice.complexity is not None
        return choice.complexity.score

    assert await score("taught", "Say hello") < 0.1
    assert await score("taught", "Tell me how to prove everything") > 0.9
    # A model that cannot embed now says nothing, and the route chooses all the same.
    assert await score("untaught", "Say hello") < 0.1


async def test_a_name_that_nobody_has_is_refused_at_once(world: World) -> None:
    for name in ("nobody", "auto:luck"):
        with pytest.raises(ModelNotFound):
            await world.engine.open(request(name))


@pytest.mark.parametrize("when_spent", ["free", "refuse"])
async def test_a_spent_budget_passes_on_only_where_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None, when_spent: str
) -> None:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    models = [
        {
            "id": "paid",
            "runtime": "remote",
            "source": "http://127.0.0.1:9/v1",  # nothing listens there, and nobody asks it
            "fallbacks": ["own"],
            "options": {"model": "m", "api_key": "none", "price": {"input": 1, "output": 1}},
        },
        {"id": "own", "runtime": "fake", "source": "none"},
    ]
    budgets = [{"provider": "paid", "day": 0, "when_spent": when_spent}]
    engine = fake_engine(FakeRuntime(), tmp_path, models=models, budgets=budgets)
    await engine.start()
    try:
        if when_spent == "refuse":
            with pytest.raises(BudgetExceeded):
                await engine.open(request("paid"))
        else:
            session = await engine.open(request("paid"))
            assert session.model.id == "own"
            assert [each.code for each in session.attempts] == ["budget_exceeded"]
            await session.close()
        assert [budget.reserved for budget in engine.accounts.budgets()] == [0]
    finally:
        await engine.stop()


async def test_each_model_that_ran_is_counted_by_itself(world: World) -> None:
    world.does["first"] = [RuntimeFailed("it broke")]
    assert await world.ask("first") == ["of second"]
    counted = dict(await world.engine.accounts.report(("model",), None, None, None))
    assert {name: counts[:2] for (name,), counts in counted.items()} == {
        "first": (1, 1),
        "second": (1, 0),
    }
