"""Anthropic's Python SDK."""

from __future__ import annotations

from typing import Literal

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool
from pydantic import BaseModel, Field
from starter import HELLO, MODEL, URL

client = Anthropic(base_url=URL, api_key="none", max_retries=0)


class City(BaseModel):
    """Where"""

    city: str = Field(pattern="^[a-z]{1,10}$")


class Mood(BaseModel):
    """The SDK does not send the bounds of strings and numbers, so there are none."""

    mood: Literal["good", "bad"]
    calm: bool


TOOL = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": City.model_json_schema(),
}


def test_message_whole() -> None:
    answer = client.messages.create(model=MODEL, messages=HELLO, max_tokens=8, system="Be brief")
    assert answer.content[0].type == "text"
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.id.startswith("msg_")
    assert answer.usage.input_tokens > 0


def test_message_streamed() -> None:
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=8) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text
    assert final.stop_reason in ("end_turn", "max_tokens")
    assert 0 < final.usage.output_tokens <= 8


async def test_message_async() -> None:
    async with AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as client:
        answer = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=4)
    assert answer.role == "assistant"


def test_tools_auto() -> None:
    answer = client.messages.create(model=MODEL, messages=HELLO, max_tokens=8, tools=[TOOL])
    uses = [block for block in answer.content if block.type == "tool_use"]
    assert (answer.stop_reason == "tool_use") == bool(uses)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
@pytest.mark.parametrize("streamed", [False, True])
def test_tools_forced(choice: object, streamed: bool) -> None:
    arguments = {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 500,
        "tools": [TOOL],
        "tool_choice": choice,
    }
    if streamed:
        with client.messages.stream(**arguments) as stream:
            answer = stream.get_final_message()
    else:
        answer = client.messages.create(**arguments)
    assert answer.stop_reason == "tool_use"
    uses = [block for block in answer.content if block.type == "tool_use"]
    assert uses
    for use in uses:
        assert use.name == "get_weather"
        City.model_validate(use.input, strict=True)
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain"} for use in uses]
    again = client.messages.create(
        model=MODEL,
        messages=[
            *HELLO,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": results},
        ],
        max_tokens=8,
        tools=[TOOL],
        tool_choice={"type": "none"},
    )
    assert again.stop_reason in ("end_turn", "max_tokens")


def test_structured_output() -> None:
    answer = client.messages.parse(model=MODEL, messages=HELLO, max_tokens=200, output_format=Mood)
    assert isinstance(answer.parsed_output, Mood)


def test_tool_runner() -> None:
    @beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return "Rain"

    runner = client.beta.messages.tool_runner(
        model=MODEL, messages=HELLO, max_tokens=8, tools=[get_weather]
    )
    assert runner.until_done().role == "assistant"


def test_count_tokens() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 1


def test_models() -> None:
    assert MODEL in [model.id for model in client.models.list()]


def test_unknown_model() -> None:
    with pytest.raises(anthropic.NotFoundError, match="tiny-qwem") as caught:
        client.messages.create(model="tiny-qwem", messages=HELLO, max_tokens=1)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert caught.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_bad_parameter(stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match="top_p"):
        client.messages.create(
            model=MODEL, messages=HELLO, max_tokens=1, stream=stream, extra_body={"top_p": 9}
        )
