"""Ollama's own client, with its native API."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import ollama
import pytest
from starter import EMBED, HELLO, MODEL, URL, Person

SHORT = {"num_predict": 8}


@pytest.fixture
def client() -> Iterator[ollama.Client]:
    with ollama.Client(URL) as client:
        yield client


def get_weather(city: str) -> str:
    """Get the weather.

    Args:
        city: Where

    """
    return f"Rain in {city}"


def test_whole(client: ollama.Client) -> None:
    answer = client.chat(f"{MODEL}:latest", HELLO, options={**SHORT, "num_ctx": 4096})
    assert answer.message.role == "assistant" and answer.message.content
    assert answer.done and answer.done_reason in ("stop", "length")
    assert 0 < answer.eval_count <= 8 < answer.prompt_eval_count
    assert 0 < answer.eval_duration < answer.total_duration
    assert answer.prompt_eval_duration > 0


def test_streamed_is_what_is_whole(client: ollama.Client) -> None:
    options = {**SHORT, "temperature": 0, "seed": 1}
    whole = client.generate(MODEL, "Hello", system="Be brief", options=options)
    parts = list(client.generate(MODEL, "Hello", system="Be brief", options=options, stream=True))
    assert "".join(part.response for part in parts) == whole.response
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count


async def test_async() -> None:
    async with ollama.AsyncClient(URL) as client:
        parts = [part async for part in await client.chat(MODEL, HELLO, options=SHORT, stream=True)]
    assert parts[-1].done


def test_raw(client: ollama.Client) -> None:
    answer = client.generate(MODEL, "Once", raw=True, options=SHORT, logprobs=True, top_logprobs=2)
    assert answer.response
    assert len(answer.logprobs) == answer.eval_count
    assert len(answer.logprobs[0].top_logprobs) >= 2


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: ollama.Client, stream: bool) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": get_weather("Paris"), "tool_name": "get_weather"},
    ]
    answer = client.chat(MODEL, messages, tools=[get_weather], options=SHORT, stream=stream)
    last = list(answer)[-1] if stream else answer
    assert last.done and last.eval_count <= 8


def test_structured_output(client: ollama.Client) -> None:
    schema = Person.model_json_schema()
    answer = client.chat(MODEL, HELLO, format=schema, options={"num_predict": 200})
    Person.model_validate_json(answer.message.content)


def test_embeddings(client: ollama.Client) -> None:
    found = client.embed(EMBED, ["one", "two"])
    assert len(found.embeddings) == 2 and found.prompt_eval_count > 0
    former = client.embeddings(EMBED, "one")
    assert former.embedding == pytest.approx(found.embeddings[0], abs=1e-5)


def test_long_text_is_cut(client: ollama.Client) -> None:
    long = "word " * 20_000
    assert len(client.embed(EMBED, long).embeddings) == 1
    with pytest.raises(ollama.ResponseError) as caught:
        client.embed(EMBED, long, truncate=False)
    assert caught.value.status_code == 400


def test_models(client: ollama.Client) -> None:
    listed = {model.model: model for model in client.list().models}
    assert {MODEL, EMBED} <= set(listed)
    assert listed[MODEL].size > 2**20 and listed[MODEL].details.family == "qwen2"
    shown = client.show(MODEL)
    assert {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["qwen2.context_length"] > 0
    assert client.show(EMBED).capabilities == ["embedding"]


def test_load_and_unload(client: ollama.Client) -> None:
    assert client.generate(MODEL, keep_alive="5m").done_reason == "load"
    running = {model.model: model for model in client.ps().models}
    assert running[MODEL].size > 0 and running[MODEL].expires_at > datetime.now(UTC)
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert MODEL not in {model.model for model in client.ps().models}


def test_pull(client: ollama.Client) -> None:
    assert client.pull(MODEL).status == "success"
    assert [part.status for part in client.pull(MODEL, stream=True)][-1] == "success"


def test_errors(client: ollama.Client) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="model 'nobody' not found") as caught:
            list(client.chat("nobody", HELLO, stream=stream))
        assert caught.value.status_code == 404
    for options, name in (({"top_p": 9}, "top_p"), ({"mirostat": 1}, "mirostat")):
        with pytest.raises(ollama.ResponseError, match=f"options.{name}") as caught:
            client.chat(MODEL, HELLO, options=options)
        assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(MODEL, HELLO, think=True)
    with pytest.raises(ollama.ResponseError, match="does not support images"):
        client.generate(MODEL, "Look", images=[b"\x89PNG\r\n\x1a\n"])
    with pytest.raises(ollama.ResponseError, match="not served here"):
        client.copy(MODEL, "other")
