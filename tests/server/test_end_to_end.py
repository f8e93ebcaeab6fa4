"""A real server in a process of its own, real models, the official clients."""

from __future__ import annotations

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from engine.requests import TextOperation
from server.routes.text import TEXT_PATHS
from tests.contract.openai import conforms
from tests.server.real import START_S, STOP_S, Server, starter_config

pytestmark = pytest.mark.slow


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]


def status(server: Server) -> Any:
    """`GET /v1/engine`, checked to add up."""
    status = httpx.get(f"{server.url}/v1/engine").json()
    ledger = status["ledger"]
    assert ledger["granted_bytes"] == sum(entry["nbytes"] for entry in ledger["entries"])
    assert ledger["free_bytes"] == ledger["capacity_bytes"] - ledger["granted_bytes"]
    assert ledger["granted_bytes"] <= ledger["capacity_bytes"]
    for model in status["models"]:
        blocks = [e for e in ledger["entries"] if e["kind"] != "lease"]
        held = sum(entry["nbytes"] for entry in blocks if entry["owner"] == model["id"])
        assert model["device_bytes"] == held
    return status


def test_the_start_says_that_the_weights_are_random(server: Server) -> None:
    assert "random" in server.log()


def test_chat(sdk: openai.OpenAI, server: Server) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model="tiny-llama", messages=HELLO, max_tokens=8, temperature=0
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens <= 8
    assert raw.headers["x-request-id"]
    for name in ("openai-processing-ms", "x-roundhouse-queue-ms", "x-roundhouse-run-ms"):
        assert float(raw.headers[name]) >= 0
    status(server)


def test_a_stream_says_the_same_as_a_document(sdk: openai.OpenAI) -> None:
    arguments: Any = {
        "model": "gpt-4o-mini",
        "messages": HELLO,
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = sdk.chat.completions.create(**arguments)
    text, usage = "", None
    for chunk in sdk.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    ):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and whole.usage is not None
    # A stream leaves out what is null.
    assert usage.model_dump(exclude_none=True) == whole.usage.model_dump(exclude_none=True)


def test_several_choices_logprobs_stop_and_seed(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="tiny-qwen",
        messages=HELLO,
        n=3,
        max_tokens=6,
        seed=7,
        logprobs=True,
        top_logprobs=2,
    )
    again = sdk.chat.completions.create(
        model="tiny-qwen",
        messages=HELLO,
        n=3,
        max_tokens=6,
        seed=7,
    )
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert len(logprobs.content[0].top_logprobs) == 2


def test_json_schema(sdk: openai.OpenAI) -> None:
    for model in ("tiny-llama", "tiny-qwen"):
        answer = sdk.chat.completions.create(
            model=model,
            messages=HELLO,
            temperature=0,
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON, "strict": True},
            },
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), PERSON)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen"])
def test_tools(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.chat.completions.create(
        model=model,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=200,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None and calls[0].type == "function"
    assert calls[0].function.name == "get_weather"
    jsonschema.validate(json.loads(calls[0].function.arguments), WEATHER["function"]["parameters"])


def test_completions_and_responses(sdk: openai.OpenAI) -> None:
    completion = sdk.completions.create(
        model="tiny-llama",
        prompt="hello",
        max_tokens=4,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert completion.choices[0].finish_reason == "length"
    response = sdk.responses.create(
        model="tiny-llama", input="hello", max_output_tokens=8, temperature=0
    )
    assert response.output_text
    kinds = [
        event.type
        for event in sdk.responses.create(
            model="tiny-llama", input="hello", max_output_tokens=8, stream=True
        )
    ]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_a_response_is_kept(sdk: openai.OpenAI) -> None:
    """By a real model: what it gets, what it answers, and what is found again."""
    told: dict[str, Any] = {"model": "tiny-qwen", "max_output_tokens": 8}
    tool: Any = {
        "type": "function",
        "name": "look",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        "strict": True,
    }
    first = sdk.responses.create(**told, input="hello", metadata={"a": "b"}, user="somebody")
    called = sdk.responses.create(
        model="tiny-qwen",
        input="look",
        previous_response_id=first.id,
        tools=[tool],
        tool_choice="required",
        max_output_tokens=300,
    )
    output: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "a train"}
        for item in called.output
        if item.type == "function_call"
    ]
    assert output
    counted = sdk.responses.input_tokens.count(
        model="tiny-qwen", input=output, previous_response_id=called.id, tools=[tool]
    )
    *_, last = sdk.responses.create(
        **told, input=output, previous_response_id=called.id, tools=[tool], stream=True
    )
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.usage is not None
    assert last.response.usage.input_tokens == counted.input_tokens
    for made in (first, called, last.response):
        found = sdk.responses.retrieve(made.id).to_dict()
        assert found == made.to_dict()
        assert conforms(found, "Response")
    page: Any = sdk.responses.input_items.list(last.response.id, order="asc")
    assert conforms(page.to_dict(), "ResponseItemList")
    assert page.data[0].content[0].text == "hello"


def test_the_oldest_items_are_dropped(sdk: openai.OpenAI) -> None:
    long: Any = [
        {"role": "user", "content": text} for text in ("word " * 3000, "and " * 7000, "last")
    ]
    ask: Any = {"model": "tiny-qwen", "max_output_tokens": 4}
    with pytest.raises(openai.BadRequestError):
        sdk.responses.create(**ask, input=long)
    cut = sdk.responses.create(**ask, input=long, truncation="auto")
    rest = sdk.responses.input_tokens.count(model="tiny-qwen", input=long[1:])
    assert cut.usage is not None
    assert cut.usage.input_tokens == rest.input_tokens
    assert cut.truncation == "auto"
    too_long: Any = [{"role": "user", "content": "and " * 9000}]
    with pytest.raises(openai.BadRequestError):
        sdk.responses.create(**ask, input=too_long, truncation="auto")


def test_anthropic_messages(server: Server) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    message = client.messages.create(
        model="tiny-llama", messages=HELLO, max_tokens=8, extra_body={"temperature": 0}
    )
    assert message.content[0].type == "text" and message.content[0].text
    with client.messages.stream(
        model="tiny-llama", messages=HELLO, max_tokens=8, extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().id.startswith("msg_")
    assert message.id.startswith("msg_")
    assert message._request_id is not None
    assert client.messages.count_tokens(model="tiny-llama", messages=HELLO).input_tokens > 1
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nothing", messages=HELLO, max_tokens=8)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="tiny-llama", messages=HELLO, max_tokens=10_000)


def test_embeddings(sdk: openai.OpenAI) -> None:
    answer = sdk.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    first, second = (item.embedding for item in answer.data)
    assert len(first) == len(second) > 1
    assert first != second
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-3)


def test_tokens_go_there_and_back(server: Server) -> None:
    text = "Grüße, 世界"
    tokens = httpx.post(
        f"{server.url}/tokenize",
        json={"model": "tiny-qwen", "prompt": text, "add_special_tokens": False},
    ).json()["tokens"]
    back = httpx.post(
        f"{server.url}/detokenize", json={"model": "tiny-qwen", "tokens": tokens}
    ).json()
    assert back["prompt"] == text


def test_models(sdk: openai.OpenAI) -> None:
    ids = {model.id for model in sdk.models.list()}
    assert {"tiny-llama", "tiny-qwen", "tiny-embed"} <= ids
    assert sdk.models.retrieve("tiny-llama").id == "tiny-llama"


def test_what_is_wrong_with_a_request_is_told(sdk: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="nothing", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "a b " * 5000}]
        )
    assert "8192" in str(long.value)
    with pytest.raises(openai.BadRequestError) as hot:
        sdk.chat.completions.create(model="tiny-llama", messages=HELLO, temperature=99)
    assert "temperature" in str(hot.value)
    with pytest.raises(openai.BadRequestError):
        sdk.embeddings.create(model="tiny-llama", input="x")
    torn = httpx.post(f"{server.url}/v1/chat/completions", content=b'{"model": ')
    assert torn.status_code == 400
    assert torn.json()["error"]["message"]
    status(server)


def test_ranking_and_moderation(server: Server, sdk: openai.OpenAI) -> None:
    documents = ["The train waits.", "Bread is baked.", "A robot paints."]
    body = {"query": "Where is the train?", "documents": documents, "top_n": 2}
    for model, path in (("rerank-v3.5", "/v2/rerank"), ("tiny-embed", "/v1/rerank")):
        answer = httpx.post(f"{server.url}{path}", json={"model": model, **body}, timeout=180)
        first, second = answer.raise_for_status().json()["results"]
        assert first["relevance_score"] >= second["relevance_score"]
        assert first["document"]["text"] == documents[first["index"]]
    moderated = sdk.moderations.create(input=["hello", "bye"])
    assert moderated.model == "tiny-classify"
    for each in moderated.results:
        assert each.flagged == any(each.categories.model_dump().values())
        assert each.category_applied_input_types.violence == ["text"]
        assert 0 <= each.category_scores.violence <= 1
        assert each.category_scores.illicit == 0
    labels = {"model": "tiny-classify", "input": "hello"}
    (found,) = httpx.post(f"{server.url}/classify", json=labels).json()["data"]
    assert len(found["probs"]) == 5


def test_masks_are_filled(server: Server, sdk: openai.OpenAI) -> None:
    body = {"model": "tiny-camembert", "inputs": "วันนี้<mask>ดีมาก ท้องฟ้า", "top_k": 3}
    one = sdk.post("/fill-mask", body=body, cast_to=list[dict[str, Any]])
    scores = [each["score"] for each in one]
    assert len(scores) == 3
    assert sorted(scores, reverse=True) == scores
    assert all(each["token_str"] in each["sequence"] for each in one)
    texts = [body["inputs"], "<mask>และ<mask>"]
    asked = {"model": "tiny-camembert", "inputs": texts, "parameters": {"top_k": 1}}
    answer = httpx.post(f"{server.url}/v1/fill-mask", json=asked).raise_for_status()
    first, second = answer.json()
    assert [each["token"] for each in first] == [one[0]["token"]]
    assert [len(each) for each in second] == [1, 1]
    vector = sdk.embeddings.create(model="tiny-camembert", input="วันนี้อากาศดี").data[0].embedding
    assert sum(each * each for each in vector) == pytest.approx(1, abs=1e-4)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.post("/fill-mask", body={**body, "inputs": "ไม่มี"}, cast_to=object)
    assert caught.value.param == "inputs"
    assert "<mask>" in caught.value.message


TASKS_OF = {
    TextOperation.EMBEDDINGS: "tiny-embed",
    TextOperation.RERANK: "tiny-rerank",
    TextOperation.SCORE: "tiny-rerank",
    TextOperation.CLASSIFY: "tiny-classify",
    TextOperation.MODERATION: "tiny-classify",
    TextOperation.FILL_MASK: "tiny-camembert",
}


@pytest.mark.parametrize("path", sorted(TEXT_PATHS))
def test_no_broken_body_gets_a_server_error(server: Server, path: str) -> None:
    model = TASKS_OF.get(TEXT_PATHS[path], "tiny-llama")
    bodies: tuple[dict[str, Any], ...] = (
        {},
        {"prompt": {}},
        {"messages": 3},
        {"input": None},
        {"tokens": "x"},
        {"inputs": 3},
        {"inputs": ["x", 3], "top_k": "x"},
        {"query": 3, "documents": ["x"]},
        {"query": "x", "documents": [3]},
        {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]},
    )
    for body in bodies:
        answer = httpx.post(f"{server.url}{path}", json={"model": model, **body}, timeout=180)
        assert 400 <= answer.status_code < 500, (body, answer.text)
        assert answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"model": "tiny-llama", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    usage = 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny-llama"}'

    def used() -> float:
        for line in httpx.get(f"{server.url}/metrics").text.splitlines():
            if line.startswith(usage):
                return float(line.split()[-1])
        raise AssertionError("no such series")

    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=180) as stream:
        lines = stream.iter_lines()  # kept: dropping it would close the stream
        assert next(lines)
        leases = {m["id"]: m["leases"] for m in status(server)["models"]}
        assert leases["tiny-llama"] == 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.5)
    deadline = time.monotonic() + START_S
    while any(m["leases"] for m in status(server)["models"]):
        assert time.monotonic() < deadline
    # vLLM reports its cache with the next step.
    httpx.post(url, json={**body, "max_tokens": 1}, timeout=180).raise_for_status()
    assert used() < 0.01


def test_metrics_and_operations(server: Server) -> None:
    httpx.post(f"{server.url}/v1/engine/models/tiny-embed/load", timeout=180).raise_for_status()
    text = httpx.get(f"{server.url}/metrics").text
    for series in (
        'roundhouse_resident_bytes{model="tiny-embed"',
        "roundhouse_queue_length",
        "roundhouse_loads_total",
        "roundhouse_load_seconds_bucket",
        "roundhouse_evictions_total",
        "roundhouse_request_seconds_bucket",
        "vllm:",
    ):
        assert series in text, series
    assert "warm-up" not in text
    for family in ("roundhouse_loads", "vllm:num_requests_running"):
        assert text.count(f"# TYPE {family}") == 1 or text.count(f"# TYPE {family}_total") == 1
    httpx.post(f"{server.url}/v1/engine/models/tiny-embed/unload", timeout=180).raise_for_status()
    (embed,) = (m for m in status(server)["models"] if m["id"] == "tiny-embed")
    assert embed["state"] == "absent"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ping").status_code == 200


def test_what_libraries_say_of_themselves_is_not_in_the_log(server: Server) -> None:
    for model in ("tiny-kokoro", "tiny-sdxl-turbo"):
        url = f"{server.url}/v1/engine/models/{model}/load"
        httpx.post(url, timeout=180).raise_for_status()
    title, *lines = server.log().splitlines()
    assert title.startswith("Roundhouse")
    ours = re.compile(r"  |\d{4}-\d\d-\d\d \S+ [A-Z]+ (engine|server)\.")
    assert [line for line in lines if not ours.match(line)] == []


def test_a_signal_lets_running_requests_finish(tmp_path: Path) -> None:
    """In room for one model, with keys; the stream under way ends whole and the exit is 0."""
    config = starter_config(tmp_path, {"tiny-llama", "tiny-qwen"})
    server = Server(
        tmp_path,
        "--config",
        str(config),
        ROUNDHOUSE_MEMORY="140MiB",
        ROUNDHOUSE_MAX_OVERTAKE_S="1",
        ROUNDHOUSE_API_KEYS="user-key",
        ROUNDHOUSE_ADMIN_KEYS="admin-key",
    )
    try:
        server.wait_ready()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="user-key", max_retries=0)

        def tokens(model: str, number: int, stop_after_first: bool = False) -> int:
            stream = client.completions.create(
                model=model,
                prompt="x",
                max_tokens=number,
                stream=True,
                # A chunk may hold several tokens where the server is slower than the model.
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            next(stream)
            if stop_after_first:
                server.process.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.usage is not None
            return last.usage.completion_tokens

        with ThreadPoolExecutor(4) as pool:
            both = [pool.submit(tokens, ("tiny-llama", "tiny-qwen")[i % 2], 8) for i in range(8)]
            assert [each.result(START_S) for each in both] == [8] * 8
        assert tokens("tiny-llama", 200, stop_after_first=True) == 200
        assert server.process.wait(STOP_S) == 0
        assert server.log().endswith("server.serve: stopped\n")
    finally:
        server.stop()
