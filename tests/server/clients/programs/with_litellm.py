"""LiteLLM, as OpenAI's and as Anthropic's client."""

from __future__ import annotations

import litellm
import pytest
from pydantic import BaseModel, Field
from starter import EMBED, HELLO, MODEL, URL, Person

OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none"}
HOSTED_VLLM = {**OPENAI, "model": f"hosted_vllm/{MODEL}"}
ANTHROPIC = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": "none"}
PROVIDERS = pytest.mark.parametrize(
    "provider", [OPENAI, HOSTED_VLLM, ANTHROPIC], ids=["openai", "hosted_vllm", "anthropic"]
)


class City(BaseModel):
    """Where"""

    city: str = Field(pattern="^[a-z]{1,10}$")


TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": City.model_json_schema()},
}


@PROVIDERS
def test_whole(provider: dict[str, str]) -> None:
    answer = litellm.completion(**provider, messages=HELLO, max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 8


@PROVIDERS
def test_streamed(provider: dict[str, str]) -> None:
    chunks = list(
        litellm.completion(
            **provider,
            messages=HELLO,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    answer = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 0


@PROVIDERS
async def test_async(provider: dict[str, str]) -> None:
    answer = await litellm.acompletion(**provider, messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.role == "assistant"


@PROVIDERS
def test_tools(provider: dict[str, str]) -> None:
    auto = litellm.completion(**provider, messages=HELLO, tools=[TOOL], max_tokens=8)
    assert auto.choices[0].finish_reason in ("stop", "length", "tool_calls")
    forced = litellm.completion(
        **provider,
        messages=HELLO,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=200,
    )
    message = forced.choices[0].message
    assert message.tool_calls
    City.model_validate_json(message.tool_calls[0].function.arguments)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"} for call in message.tool_calls
    ]
    again = litellm.completion(
        **provider, messages=[*HELLO, message, *results], tools=[TOOL], max_tokens=8
    )
    assert again.choices[0].message.role == "assistant"


@PROVIDERS
def test_structured_output(provider: dict[str, str]) -> None:
    answer = litellm.completion(**provider, messages=HELLO, response_format=Person, max_tokens=200)
    Person.model_validate_json(answer.choices[0].message.content)


def test_responses() -> None:
    answer = litellm.responses(**OPENAI, input="Hello", max_output_tokens=16)
    assert answer.status in ("completed", "incomplete")


def test_embeddings() -> None:
    answer = litellm.embedding(
        model=f"openai/{EMBED}", api_base=f"{URL}/v1", api_key="none", input=["one", "two"]
    )
    assert len(answer.data) == 2


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
def test_errors(provider: dict[str, str]) -> None:
    with pytest.raises(litellm.NotFoundError, match="tiny-qwen-x"):
        litellm.completion(**{**provider, "model": provider["model"] + "-x"}, messages=HELLO)
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(**provider, messages=HELLO, top_p=9, max_tokens=1)
