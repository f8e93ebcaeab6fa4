"""pydantic-ai over chat, responses and messages."""

from __future__ import annotations

import pytest
from anthropic import AsyncAnthropic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from starter import MODEL, URL, Person

OPENAI = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
CLAUDE = AnthropicProvider(
    anthropic_client=AsyncAnthropic(base_url=URL, api_key="none", max_retries=0)
)
MODELS = {
    "chat": lambda name: OpenAIChatModel(name, provider=OPENAI),
    "responses": lambda name: OpenAIResponsesModel(name, provider=OPENAI),
    "messages": lambda name: AnthropicModel(name, provider=CLAUDE),
}


CLASH = "pydantic-ai 2.31 builds a type of Anthropic's SDK that is a union in its version 2.14"


@pytest.fixture(
    params=[
        "chat",
        "responses",
        pytest.param(
            "messages", marks=pytest.mark.xfail(strict=True, raises=TypeError, reason=CLASH)
        ),
    ]
)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param](MODEL)


async def test_text(model: Model) -> None:
    answer = await Agent(model, model_settings={"max_tokens": 16}).run("Hello")
    assert answer.output
    assert answer.usage.output_tokens > 0


async def test_streamed(model: Model) -> None:
    agent = Agent(model, model_settings={"max_tokens": 16})
    async with agent.run_stream("Hello") as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True)]
        assert "".join(pieces) == await answer.get_output()
    assert answer.usage.output_tokens > 0


async def test_output_type_as_a_tool(model: Model) -> None:
    """The tool is forced, as every output must be a call."""
    agent = Agent(
        model,
        output_type=ToolOutput(Person),
        model_settings={"max_tokens": 200, "parallel_tool_calls": False},
    )
    assert isinstance((await agent.run("Hello")).output, Person)


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_native_output_type(kind: str) -> None:
    agent = Agent(
        MODELS[kind](MODEL), output_type=NativeOutput(Person), model_settings={"max_tokens": 200}
    )
    assert isinstance((await agent.run("Hello")).output, Person)


async def test_function_tool(model: Model) -> None:
    agent = Agent(model, model_settings={"max_tokens": 16})

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return "Rain"

    first = await agent.run("Hello")
    second = await agent.run("And now?", message_history=first.all_messages())
    assert second.output


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_unknown_model(kind: str) -> None:
    with pytest.raises(ModelHTTPError, match="tiny-qwem") as caught:
        await Agent(MODELS[kind]("tiny-qwem")).run("Hello")
    assert caught.value.status_code == 404
