"""Events keep a frame's distance, and get longer while the event loop is busy with many streams."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.events import Frame
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.runtimes.vllm.stream_pace import (
    BUSY,
    CROWD,
    FRAME_S,
    HOLD_S,
    IDLE,
    MAX_TOKENS,
    OBSERVED_S,
    PACE,
    StreamPace,
)
from tests.engine.conftest import MakeModel

CROWDED = 1000
INSTANT_S = 1e-6


class Loop:
    """A loop that is busy for a share of its time."""

    def __init__(self, streams: int = CROWDED) -> None:
        self.now_s = 100.0
        self.busy_s = 5.0
        self.pace = StreamPace(lambda: self.now_s, lambda: self.busy_s)
        self.pace.streams = streams
        self.pace.observe()

    def spend(self, share: float, seconds: float = OBSERVED_S) -> int:
        """Pass time; returns the tokens of an event after it."""
        self.now_s += seconds
        self.busy_s += share * seconds
        self.pace.observe()
        return self.pace.tokens

    def due(self, tokens: int, after_s: float) -> bool:
        """Whether an event of so many tokens is due so long after the last."""
        return self.pace.due(tokens, self.now_s - after_s)


def test_events_get_longer_step_by_step_while_the_loop_is_busy() -> None:
    loop = Loop()
    assert loop.pace.tokens == 1
    assert [loop.spend(BUSY + 0.1) for _ in range(5)] == [2, 4, MAX_TOKENS, MAX_TOKENS, MAX_TOKENS]


def test_events_get_shorter_step_by_step_while_it_is_idle() -> None:
    loop = Loop()
    while loop.spend(1.0) < MAX_TOKENS:
        pass
    assert loop.spend((BUSY + IDLE) / 2) == MAX_TOKENS
    assert [loop.spend(IDLE / 2) for _ in range(5)] == [4, 2, 1, 1, 1]


def test_what_it_does_is_looked_at_now_and_then() -> None:
    loop = Loop()
    assert [loop.spend(1.0, OBSERVED_S / 4) for _ in range(4)] == [1, 1, 1, 2]
    # A short burst within a quiet time is no reason.
    assert loop.spend(IDLE / 2, 10 * OBSERVED_S) == 1


@pytest.mark.parametrize(("streams", "tokens"), [(0, 1), (1, 1), (3, 1), (4, 2), (7, 3), (16, 8)])
def test_events_of_few_streams_stay_short(streams: int, tokens: int) -> None:
    loop = Loop(streams)
    for _ in range(2 * MAX_TOKENS):
        loop.spend(1.0)
    assert loop.pace.tokens == tokens


def test_what_few_streams_did_not_need_is_not_remembered() -> None:
    loop = Loop(streams=1)
    for _ in range(2 * MAX_TOKENS):
        loop.spend(1.0)
    loop.pace.streams = CROWDED
    assert loop.pace.tokens == 2


def test_no_event_comes_within_a_frame_of_the_last() -> None:
    loop = Loop(streams=1)
    assert not loop.due(100, FRAME_S - INSTANT_S)
    assert loop.due(1, FRAME_S + INSTANT_S)


@pytest.mark.parametrize(("streams", "hold_s"), [(CROWD, HOLD_S), (3 * CROWD, 3 * HOLD_S)])
def test_an_event_waits_for_its_tokens_and_no_longer_than_it_may(
    streams: int, hold_s: float
) -> None:
    loop = Loop(streams)
    while loop.spend(1.0) < MAX_TOKENS:
        pass
    assert loop.due(MAX_TOKENS, FRAME_S + INSTANT_S)
    assert not loop.due(MAX_TOKENS - 1, hold_s - INSTANT_S)
    assert loop.due(1, hold_s + INSTANT_S)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
class TestStreams:
    """Real streams of a real engine, with the pace set from outside."""

    @pytest.fixture(autouse=True)
    def unobserved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StreamPace, "observe", lambda _: None)
        monkeypatch.setattr(PACE, "streams", CROWDED)
        # By tokens alone: at each look more than a frame has passed.
        clock = itertools.count(step=2 * FRAME_S)
        monkeypatch.setattr(PACE, "_wall", lambda: next(clock))

    @pytest.fixture
    def unmerged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Events come as they were made, also where other programs keep the loop from its turn."""
        collector = "engine.runtimes.vllm.output_collector.READ_BY_PARSER"
        monkeypatch.setattr(collector, ContextVar("read_by_parser", default=True))

    @pytest.fixture
    def model(self, make_model: MakeModel) -> ModelConfig:
        return make_model("llama")

    @pytest_asyncio.fixture(loop_scope="session")
    async def loaded(
        self, vllm_runtime: VllmRuntime, model: ModelConfig
    ) -> AsyncIterator[VllmModel]:
        loaded = await vllm_runtime.load(model, lambda _: None)
        assert isinstance(loaded, VllmModel)
        yield loaded
        await vllm_runtime.unload(loaded)

    @pytest.fixture
    def ask(self, vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel) -> Any:
        """A function that asks the model."""

        async def ask(turn: Any = None, **body: Any) -> list[dict[str, Any]]:
            """The chunks of an answer of ten tokens; `turn` is called after each."""
            request = TextRequest(
                model.id,
                TextOperation.CHAT,
                {
                    "messages": [{"role": "user", "content": "hello"}],
                    "max_tokens": 10,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logprobs": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    **body,
                },
                request_id="paced",
            )
            chunks = []
            async for event in loaded.run(vllm_runtime.prepare(model, request)):
                assert isinstance(event, Frame)
                data = event.data.removeprefix("data: ").strip()
                if data != "[DONE]":
                    chunks.append(json.loads(data))
                    if turn is not None:
                        turn(len(chunks))
            return chunks

        return ask

    async def test_unmerged_outputs_come_in_order_and_the_error_last(self) -> None:
        from vllm.sampling_params import RequestOutputKind

        from engine.runtimes.vllm.output_collector import UnmergedOutputCollector

        collector = UnmergedOutputCollector(RequestOutputKind.DELTA, "unmerged")
        assert collector.get_nowait() is None
        waiting = asyncio.create_task(collector.get())
        await asyncio.sleep(0)
        for output in ("one", "two", "three", ValueError("end")):
            collector.put(output)
        assert await waiting == "one"
        assert collector.get_nowait() == "two"
        assert await collector.get() == "three"
        with pytest.raises(ValueError, match="end"):
            await collector.get()
        assert collector.get_nowait() is None

    @pytest.mark.usefixtures("unmerged")
    async def test_an_event_has_as_many_tokens_as_it_should(
        self, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "_tokens", 1)
        alone = await ask()
        assert token_counts(alone) == [1] * 10

        monkeypatch.setattr(PACE, "_tokens", 4)
        crowded = await ask()
        assert token_counts(crowded) == [1, 4, 4, 1]
        assert whole(crowded) == whole(alone)

        # A client that says how it wants them gets them so, whatever the others do.
        assert token_counts(await ask(stream_interval=1)) == [1] * 10
        assert token_counts(await ask(stream_interval=5)) == [1, 5, 4]

        # Two choices are two sequences.
        two = {"n": 2, "temperature": 1, "seed": 5, "logprobs": False}
        both = await ask(**two)
        assert both[-1]["usage"]["completion_tokens"] == 20
        for index in (0, 1):
            singly = await ask(stream_interval=1, **two)
            assert text(both, index) == text(singly, index) != ""

    @pytest.mark.usefixtures("unmerged")
    async def test_tokens_of_one_frame_come_in_one_event(
        self, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "_tokens", 1)
        monkeypatch.setattr(PACE, "_wall", lambda: 0.0)
        at_once = await ask()
        assert token_counts(at_once) == [1, 9]
        assert whole(at_once) == whole(await ask(stream_interval=1))

    @pytest.mark.usefixtures("unmerged")
    async def test_what_a_parser_reads_comes_token_by_token(
        self, loaded: VllmModel, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "_tokens", 8)
        tool = {"type": "function", "function": {"name": "f"}}
        # Not even where no call may be made: thoughts and calls are looked for in many ways.
        assert token_counts(await ask(tools=[tool], tool_choice="none")) == [1] * 10
        assert token_counts(await ask()) == [1, 8, 1]

        thoughtful = loaded._options.model_copy(update={"reasoning_parser": "any"})
        monkeypatch.setattr(loaded, "_options", thoughtful)
        assert token_counts(await ask()) == [1] * 10
        assert token_counts(await ask(stream_interval=5)) == [1, 5, 4]

    async def test_what_a_parser_reads_is_not_merged_while_the_loop_lags(
        self, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "_tokens", 1)

        def lag(_count: int) -> None:
            time.sleep(0.1)  # many steps of this model

        tool = {"type": "function", "function": {"name": "f"}}
        assert token_counts(await ask(lag, tools=[tool], tool_choice="none")) == [1] * 10
        assert max(token_counts(await ask(lag))) > 1

    async def test_the_pace_may_change_in_the_middle_of_a_stream(
        self, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "_tokens", 1)
        alone = await ask()

        def turn(count: int) -> None:
            PACE._tokens = (3, 1, 4, 2)[count % 4]

        assert whole(await ask(turn)) == whole(alone)

    async def test_streams_under_way_are_counted(
        self, ask: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PACE, "streams", 0)
        seen: set[int] = set()
        await asyncio.gather(*(ask(lambda _: seen.add(PACE.streams)) for _ in range(3)))
        assert max(seen) == 3
        assert PACE.streams == 0


def token_counts(chunks: list[dict[str, Any]]) -> list[int]:
    """How many tokens came with each chunk that had some."""
    return [
        len(choice["logprobs"]["content"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice.get("logprobs")
    ]


def text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The answer of a choice."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def whole(chunks: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The text, each token with its probability, and the usage."""
    logprobs = [
        (entry["token"], entry["logprob"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice.get("logprobs")
        for entry in choice["logprobs"]["content"]
    ]
    return text(chunks), logprobs, chunks[-1]["usage"]["completion_tokens"]
