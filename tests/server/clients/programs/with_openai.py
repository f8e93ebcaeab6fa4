"""OpenAI's Python SDK."""

from __future__ import annotations

import base64
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field
from starter import EMBED, HELLO, MODEL, URL, Person

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


class GetWeather(BaseModel):
    """The weather in a city"""

    city: str = Field(pattern="^[a-z]{1,10}$")


LOOSE_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[a-z]{1,10}$"}},
            "required": ["city"],
        },
    },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


def test_models() -> None:
    ids = [model.id for model in client.models.list()]
    assert MODEL in ids
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_whole() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, max_tokens=8, stream_options={"include_usage": True}
    ) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == deltas
    assert final.choices[0].finish_reason in ("stop", "length")
    assert final.usage.completion_tokens <= 8


async def test_chat_async() -> None:
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=4, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_chat_parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Person, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_chat_parse_streamed() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, response_format=Person, max_tokens=200
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


def test_tools_auto() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[LOOSE_TOOL], max_tokens=8
    )
    choice = answer.choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)


@pytest.mark.parametrize("choice", ["required", FORCED], ids=["required", "named"])
def test_tools_forced(choice: object) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[LOOSE_TOOL], tool_choice=choice, max_tokens=500
    )
    message = answer.choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name == "get_weather"
        GetWeather.model_validate_json(call.function.arguments, strict=True)
    again = client.chat.completions.create(
        model=MODEL,
        messages=[
            *HELLO,
            message,
            *(
                {"role": "tool", "tool_call_id": call.id, "content": "Rain"}
                for call in message.tool_calls
            ),
        ],
        tools=[LOOSE_TOOL],
        tool_choice="none",
        max_tokens=8,
    )
    assert again.choices[0].message.tool_calls is None


def test_tools_parsed_and_streamed() -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=HELLO,
        tools=[pydantic_function_tool(GetWeather, name="get_weather")],
        tool_choice=FORCED,
        parallel_tool_calls=False,
        max_tokens=200,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_completions() -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_responses_whole() -> None:
    answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=16)
    assert answer.status in ("completed", "incomplete")
    assert answer.output[0].type == "message"
    assert answer.usage.output_tokens <= 16
    turns = [{"role": "user", "content": "Hello"}, *answer.output, *HELLO]
    assert client.responses.create(model=MODEL, input=turns, max_output_tokens=16).id


def test_responses_streamed() -> None:
    with client.responses.stream(model=MODEL, input="Hello", max_output_tokens=16) as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text


def test_responses_parse() -> None:
    answer = client.responses.parse(
        model=MODEL, input="Hello", text_format=Person, max_output_tokens=200
    )
    assert isinstance(answer.output_parsed, Person)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_responses_tools(choice: str) -> None:
    tool = {"type": "function", "strict": True, **openai_tool()}
    answer = client.responses.create(
        model=MODEL, input="Hello", tools=[tool], tool_choice=choice, max_output_tokens=500
    )
    calls = [item for item in answer.output if item.type == "function_call"]
    if choice == "auto":
        return
    assert calls
    for call in calls:
        assert call.name == "get_weather"
        GetWeather.model_validate_json(call.arguments)
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
        for call in calls
    ]
    again = client.responses.create(
        model=MODEL,
        input=[*HELLO, *answer.output, *results],
        tools=[tool],
        max_output_tokens=16,
    )
    assert again.status in ("completed", "incomplete")


def openai_tool() -> dict[str, object]:
    return {
        "name": "get_weather",
        "parameters": GetWeather.model_json_schema() | {"additionalProperties": False},
    }


def test_embeddings() -> None:
    # The SDK asks for base64 and decodes it.
    answer = client.embeddings.create(model=EMBED, input=["one", "two"])
    assert [item.index for item in answer.data] == [0, 1]
    assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens > 0


def test_images() -> None:
    answer = client.images.generate(
        model="gpt-image-1", prompt="a red train", size="128x128", quality="low"
    )
    png = base64.b64decode(answer.data[0].b64_json)
    assert png.startswith(b"\x89PNG")
    edited = client.images.edit(
        model="gpt-image-1",
        image=("train.png", png, "image/png"),
        prompt="blue",
        size="128x128",
        quality="low",
    )
    assert base64.b64decode(edited.data[0].b64_json).startswith(b"\x89PNG")


def test_speech_and_transcription() -> None:
    speech = client.audio.speech.create(
        model="tts-1", voice="alloy", input="Hello.", response_format="wav"
    ).read()
    assert speech.startswith(b"RIFF")
    sound = ("speech.wav", speech, "audio/wav")
    assert isinstance(client.audio.transcriptions.create(model="whisper-1", file=sound).text, str)
    verbose = client.audio.transcriptions.create(
        model="whisper-1",
        file=sound,
        response_format="verbose_json",
        timestamp_granularities=["word"],
    )
    assert verbose.duration > 0
    events = list(client.audio.transcriptions.create(model="whisper-1", file=sound, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert isinstance(client.audio.translations.create(model="whisper-1", file=sound).text, str)


def test_unknown_model() -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="tiny-qwem", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "tiny-qwem" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_bad_parameter(stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=9, max_tokens=1, stream=stream
        )
    assert "temperature" in caught.value.message
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    json.dumps(caught.value.body)
