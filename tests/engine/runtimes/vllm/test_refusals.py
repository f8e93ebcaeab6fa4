"""What is wrong with a text request is said by the field and the rule, in its client's words."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.refusals import plain, refusal
from engine.runtimes.vllm.runtime import VllmRuntime

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

CHAT, COMPLETION = TextOperation.CHAT, TextOperation.COMPLETION
RESPONSES, MESSAGES = TextOperation.RESPONSES, TextOperation.MESSAGES
EMBEDDINGS = TextOperation.EMBEDDINGS
ASK: Any = [{"role": "user", "content": "hi"}]


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


@pytest.mark.parametrize(
    ("operation", "body", "param", "rule"),
    [
        (CHAT, {"messages": ASK, "stop": [*"abcde"]}, "stop", "at most 4 items, not 5"),
        (COMPLETION, {"prompt": "x", "stop": [*"abcde"]}, "stop", "at most 4 items, not 5"),
        (CHAT, {"messages": ASK, "stop": [1]}, "stop[0]", "valid string"),
        (CHAT, {"messages": ASK, "stop": 5}, "stop", "a valid string or a valid list"),
        (CHAT, {"messages": None}, "messages", "a list"),
        (CHAT, {"messages": ["x"]}, "messages[0]", "a valid dictionary"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        (CHAT, said(content=None), "messages[0].content", "a valid string"),
        (
            CHAT,
            said(content=[{"type": "input_text", "text": "x"}]),
            "messages[0].content[0].type",
            "'input_text' is none of 'text', 'image_url'",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
            "messages[0].tool_calls[0].id",
            "a valid string",
        ),
        (CHAT, {"messages": ASK, "response_format": {"type": "x"}}, "response_format.type", "'x'"),
        (
            CHAT,
            {
                "messages": ASK,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": True},
                },
            },
            "response_format.json_schema.schema",
            "a valid dictionary",
        ),
        (
            CHAT,
            {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
            "required",
        ),
        (CHAT, {"messages": ASK, "max_tokens": True}, "max_tokens", "not true or false"),
        (CHAT, {"messages": ASK, "temperature": False}, "temperature", "not true or false"),
        (COMPLETION, {"prompt": "x", "logprobs": True}, "logprobs", "not true or false"),
        (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "'alien'"),
        (CHAT, said(), "messages[0].content", "required"),
        (CHAT, {"messages": [*ASK, {"role": "assistant"}]}, "messages[1].content", "required"),
        (
            CHAT,
            {"messages": [*ASK, {"role": "tool", "content": "x"}]},
            "messages[1].tool_call_id",
            "required",
        ),
        (COMPLETION, {"prompt": {"a": 1}}, "prompt", "a valid list or a valid string"),
        (RESPONSES, {"input": 5}, "input", "a valid string or a valid list"),
        (
            RESPONSES,
            {"input": "x", "text": {"format": {"type": "x"}}},
            "text.format.type",
            "'x' is none of 'text', 'json_schema', 'json_object'",
        ),
        (
            MESSAGES,
            {"messages": ASK, "max_tokens": 9, "stop_sequences": [*"abcde"]},
            "stop_sequences",
            "at most 4 items",
        ),
        (
            MESSAGES,
            {"max_tokens": 9, **said(content=[{"type": "document", "source": {}}])},
            "messages[0].content[0].source",
            "",
        ),
        (
            MESSAGES,
            {
                "messages": ASK,
                "max_tokens": 9,
                "thinking": {"type": "enabled", "budget_tokens": 1},
            },
            "thinking.budget_tokens",
            "1024",
        ),
        (EMBEDDINGS, {"input": 5}, "input", "a valid list or a valid string"),
        (EMBEDDINGS, {"input": [[1, "a"]]}, "input[0][1]", "a valid integer"),
    ],
)
async def test_the_field_and_the_rule_are_named(
    vllm_runtime: VllmRuntime,
    operation: TextOperation,
    body: dict[str, Any],
    param: str,
    rule: str,
) -> None:
    task: Any = "embed" if operation is EMBEDDINGS else "generate"
    model = ModelConfig(id="m", source="starter:tiny-llama", task=task)
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(model, TextRequest("m", operation, body, "test"))
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert rule in caught.value.message
    for words in ("pydantic", "Param", "ValidatorIterator", "(parameter=", "instance of"):
        assert words not in caught.value.message


async def test_messages_that_clients_send_back_are_taken(vllm_runtime: VllmRuntime) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    model = ModelConfig(id="m", source="starter:tiny-llama")
    for said in (
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "refusal": "no"},
        {"role": "developer", "content": "x"},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ):
        body = {"messages": [*ASK, said], "logprobs": True, "max_tokens": None}
        vllm_runtime.prepare(model, TextRequest("m", CHAT, body, "test"))


@pytest.mark.parametrize("item", [{"role": "user"}, {"type": "function_call", "name": "f"}])
async def test_a_wrong_item_of_a_response_is_found(
    vllm_runtime: VllmRuntime, item: dict[str, Any]
) -> None:
    model = ModelConfig(id="m", source="starter:tiny-llama")
    with pytest.raises(InvalidRequest) as caught:
        body = {"input": [*ASK, item]}
        vllm_runtime.prepare(model, TextRequest("m", RESPONSES, body, "test"))
    assert caught.value.param is not None
    assert caught.value.param.startswith("input[1]")


async def test_no_advice_to_whoever_runs_the_server() -> None:
    told = plain("n must be at most 9, got 10. To increase it, set the VLLM_MAX_N variable.")
    assert told == "n must be at most 9, got 10."
    assert "--" not in plain('"auto" tool choice requires --enable-auto-tool-choice to be set')
    assert plain("top_p is wrong. (parameter=top_p, value=2)") == "top_p is wrong."
    assert plain("cannot read /srv/models/llama/config.json") == "cannot read config.json"
    assert plain("Pointer '/nope' does not exist at #/a/b") == (
        "Pointer '/nope' does not exist at #/a/b"
    )


@pytest.mark.parametrize(
    ("message", "param", "body", "named"),
    [
        ("the prompt is too long", "input_tokens", {"messages": []}, "messages"),
        ("n must be at least 1, got 0.", None, {"n": 0}, "n"),
        ("`logprobs` is wrong", None, {"logprobs": 1}, "logprobs"),
        ("Grammar error: bad", None, {"response_format": {}}, "response_format"),
        ("Token id 9 is out of vocabulary", None, {"input": [9]}, "input"),
        ("only supports dimensions in range [1, 8], got 9", None, {"dimensions": 9}, "dimensions"),
        ("something else", None, {"n": 0}, None),
    ],
)
async def test_an_error_of_the_model_names_a_field_that_was_sent(
    message: str, param: str | None, body: dict[str, Any], named: str | None
) -> None:
    assert refusal(message, param, body).param == named


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"messages": [], "max_tokens": 9, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": [], "max_tokens": 0, "max_completion_tokens": None}, "max_tokens"),
    ],
)
async def test_a_length_has_the_name_that_the_client_gave_it(
    body: dict[str, Any], named: str
) -> None:
    told = refusal("max_tokens must be at least 1, got 0.", "max_tokens", body)
    assert (told.param, told.message) == (named, f"{named} must be at least 1, got 0.")
