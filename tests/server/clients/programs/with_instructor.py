"""instructor: `response_model` in each of its modes that this server takes."""

from __future__ import annotations

import instructor
import pytest
from instructor import Mode
from openai import OpenAI
from starter import HELLO, MODEL, URL, Person

openai = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA], ids=["tools", "json_schema"])
def test_response_model(mode: Mode) -> None:
    client = instructor.from_openai(openai, mode=mode)
    arguments = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "max_retries": 1}
    person, whole = client.chat.completions.create_with_completion(
        **arguments, response_model=Person
    )
    assert isinstance(person, Person)
    assert whole.usage.completion_tokens > 0
    *_, last = client.chat.completions.create_partial(**arguments, response_model=Person)
    Person.model_validate(last.model_dump())


def test_responses() -> None:
    client = instructor.from_openai(openai, mode=Mode.RESPONSES_TOOLS)
    person = client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=200, response_model=Person, max_retries=1
    )
    assert isinstance(person, Person)


def test_anthropic() -> None:
    from anthropic import Anthropic

    claude = Anthropic(base_url=URL, api_key="none", max_retries=0)
    client = instructor.from_anthropic(claude)
    person = client.messages.create(
        model=MODEL, messages=HELLO, max_tokens=200, response_model=Person, max_retries=1
    )
    assert isinstance(person, Person)


def test_error() -> None:
    client = instructor.from_openai(openai)
    with pytest.raises(Exception, match="tiny-qwem"):
        client.chat.completions.create(
            model="tiny-qwem", messages=HELLO, response_model=Person, max_retries=1
        )
