"""OpenAI's Agents SDK over chat and responses."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from starter import MODEL, URL, Person

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
called = []


@function_tool
def get_weather(day: Literal["today", "tomorrow"]) -> str:
    """The weather of a day"""
    called.append(day)
    return "Rain"


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def kind(request: pytest.FixtureRequest) -> type:
    return request.param


def agent(kind: type, model: str = MODEL, max_tokens: int = 200, **more: object) -> Agent:
    settings = ModelSettings(max_tokens=max_tokens, include_usage=True, **more.pop("set", {}))
    return Agent(
        name="Agent",
        instructions="Be brief",
        model=kind(model=model, openai_client=client),
        model_settings=settings,
        **more,
    )


async def test_text(kind: type) -> None:
    answer = await Runner.run(agent(kind, max_tokens=16), "Hello")
    assert answer.final_output
    assert answer.context_wrapper.usage.output_tokens > 0
    again = await Runner.run(
        agent(kind, max_tokens=16), [*answer.to_input_list(), {"role": "user", "content": "More"}]
    )
    assert again.final_output


async def test_streamed(kind: type) -> None:
    """With structured output, which ends: the SDK raises where a response is incomplete."""
    answer = Runner.run_streamed(agent(kind, output_type=Person), "Hello")
    events = [event async for event in answer.stream_events()]
    assert isinstance(answer.final_output, Person)
    assert any(event.type == "raw_response_event" for event in events)


@pytest.mark.parametrize("streamed", [False, True])
async def test_forced_tool(kind: type, streamed: bool) -> None:
    """The agent calls the tool, and sends its result in a second turn."""
    called.clear()
    has_tool = agent(
        kind,
        tools=[get_weather],
        set={"tool_choice": "required", "parallel_tool_calls": False},
    )
    if streamed:
        answer = Runner.run_streamed(has_tool, "Hello")
        try:
            async for _ in answer.stream_events():
                pass
        except ModelBehaviorError as error:
            # Of a second turn, whose random text may reach its limit.
            assert "response.incomplete" in str(error)
            assert called
            return
    else:
        answer = await Runner.run(has_tool, "Hello")
    assert called
    assert len(answer.raw_responses) >= 2


async def test_output_type(kind: type) -> None:
    answer = await Runner.run(agent(kind, output_type=Person), "Hello")
    assert isinstance(answer.final_output, Person)


async def test_unknown_model(kind: type) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-qwem"):
        await Runner.run(agent(kind, model="tiny-qwem"), "Hello")
