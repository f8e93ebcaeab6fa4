"""Each field of a text request works, has no effect by design, or is refused by its name."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from anthropic.types.beta import message_create_params as beta_messages
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.request_fields import (
    CHOICE_TYPES,
    HARMLESS,
    INPUT_TYPES,
    REFUSED,
    TOOL_TYPES,
)
from engine.runtimes.vllm.runtime import VllmRuntime

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

DOCUMENT = json.loads(
    (Path(__file__).parents[3] / "contract" / "openai_text.json").read_text(encoding="utf-8")
)
OPENAI = {
    TextOperation.CHAT: "chat/completions",
    TextOperation.COMPLETION: "completions",
    TextOperation.RESPONSES: "responses",
    TextOperation.EMBEDDINGS: "embeddings",
}
ANTHROPIC = {
    TextOperation.MESSAGES: MessageCreateParamsBase,
    TextOperation.COUNT_TOKENS: MessageCountTokensParams,
}
ASK: Any = [{"role": "user", "content": "hi"}]
LEAST: dict[TextOperation, dict[str, Any]] = {
    TextOperation.CHAT: {"messages": ASK},
    TextOperation.COMPLETION: {"prompt": "hi"},
    TextOperation.RESPONSES: {"input": "hi"},
    TextOperation.EMBEDDINGS: {"input": "hi"},
    TextOperation.MESSAGES: {"messages": ASK, "max_tokens": 1},
    TextOperation.COUNT_TOKENS: {"messages": ASK},
}


def prepare(runtime: VllmRuntime, operation: TextOperation, /, **fields: Any) -> Any:
    task: Any = "embed" if operation is TextOperation.EMBEDDINGS else "generate"
    options = {"tool_call_parser": "hermes"} if task == "generate" else {}
    model = ModelConfig(id="m", source="starter:tiny-llama", task=task, options=options)
    body = {**LEAST[operation], **fields}
    return runtime.prepare(model, TextRequest("m", operation, body, "test")).payload


def refused(runtime: VllmRuntime, operation: TextOperation, /, **fields: Any) -> str | None:
    """The field that is named."""
    with pytest.raises(InvalidRequest) as caught:
        prepare(runtime, operation, **fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.param.split("[")[0].split(".")[0] in caught.value.message
    return caught.value.param


def published(operation: TextOperation) -> set[str]:
    if operation in OPENAI:
        return {*DOCUMENT["fields"][OPENAI[operation]]}
    fields = {*typing.get_type_hints(ANTHROPIC[operation])}
    if operation is TextOperation.MESSAGES:
        fields |= {*typing.get_type_hints(beta_messages.MessageCreateParamsBase)}
        fields -= {"betas"}  # a header
    return fields


@pytest.mark.parametrize("operation", LEAST)
async def test_each_published_field_is_decided(
    vllm_runtime: VllmRuntime, operation: TextOperation
) -> None:
    """A field that the documents add shows up here, or is refused as unknown."""
    known = vllm_runtime._fields[operation]
    harmless, no = HARMLESS.get(operation, frozenset()), REFUSED.get(operation, {})
    assert not harmless & no.keys()
    for field in published(operation):
        if field in no:
            assert refused(vllm_runtime, operation, **{field: ["something"]}) == field
        elif field in harmless and field not in known:
            assert not hasattr(prepare(vllm_runtime, operation, **{field: "x"}), field)
        elif field not in known:
            assert refused(vllm_runtime, operation, **{field: "x"}) == field
            assert operation is TextOperation.MESSAGES, f"decide what becomes of {field}"


@pytest.mark.parametrize("operation", LEAST)
async def test_an_unknown_field_is_named(
    vllm_runtime: VllmRuntime, operation: TextOperation
) -> None:
    assert refused(vllm_runtime, operation, guided_json={}) == "guided_json"


@pytest.mark.parametrize(
    ("operation", "fields"),
    [
        (TextOperation.CHAT, {"modalities": ["text"], "audio": None, "verbosity": "medium"}),
        (TextOperation.CHAT, {"functions": [], "function_call": "none", "store": True}),
        (TextOperation.COMPLETION, {"best_of": 1, "suffix": None}),
        (TextOperation.RESPONSES, {"background": False, "conversation": None, "store": True}),
        (TextOperation.RESPONSES, {"text": {"verbosity": "medium"}, "include": []}),
        (TextOperation.MESSAGES, {"mcp_servers": [], "container": None, "speed": "standard"}),
    ],
)
async def test_a_value_that_asks_for_nothing_is_taken(
    vllm_runtime: VllmRuntime, operation: TextOperation, fields: dict[str, Any]
) -> None:
    prepare(vllm_runtime, operation, **fields)


async def test_a_null_that_no_answer_may_repeat_is_the_default(vllm_runtime: VllmRuntime) -> None:
    payload = prepare(vllm_runtime, TextOperation.RESPONSES, truncation=None)
    assert payload.truncation == "disabled"


@pytest.mark.parametrize("operation", [TextOperation.CHAT, TextOperation.RESPONSES])
@pytest.mark.parametrize("tools", [True, 0, 1.5, "x"])
async def test_tools_that_are_no_list(
    vllm_runtime: VllmRuntime, operation: TextOperation, tools: Any
) -> None:
    assert refused(vllm_runtime, operation, tools=tools) == "tools"


async def test_what_hosted_tools_would_include_is_named(vllm_runtime: VllmRuntime) -> None:
    operation = TextOperation.RESPONSES
    include = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    prepare(vllm_runtime, operation, include=include)
    for each in ("file_search_call.results", "message.input_image.image_url"):
        assert refused(vllm_runtime, operation, include=[*include, each]) == "include[2]"


@pytest.mark.parametrize("operation", [TextOperation.CHAT, TextOperation.RESPONSES])
async def test_hosted_tools_are_named(vllm_runtime: VllmRuntime, operation: TextOperation) -> None:
    for kind in DOCUMENT["tools"][OPENAI[operation]]:
        if kind not in TOOL_TYPES[operation]:
            tools = [{"type": kind}]
            assert refused(vllm_runtime, operation, tools=tools) == "tools[0].type"
    for kind in DOCUMENT["tool_choice"][OPENAI[operation]]:
        if kind not in CHOICE_TYPES[operation]:
            choice = {"type": kind}
            assert refused(vllm_runtime, operation, tool_choice=choice) == "tool_choice.type"


async def test_items_of_hosted_tools_and_of_a_store_are_named(vllm_runtime: VllmRuntime) -> None:
    for kind in DOCUMENT["input"]:
        if kind not in INPUT_TYPES:
            items = [*ASK, {"type": kind, "id": "x"}]
            assert refused(vllm_runtime, TextOperation.RESPONSES, input=items) == "input[1].type"


async def test_hosted_tools_of_anthropic_are_named(vllm_runtime: VllmRuntime) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    assert refused(vllm_runtime, TextOperation.MESSAGES, tools=tools) == "tools[0].type"


async def test_anthropics_tool_runner_learns_that_nothing_is_stored(
    vllm_runtime: VllmRuntime,
) -> None:
    """It tries a thread first. These words make it send the whole history."""
    with pytest.raises(InvalidRequest, match="thread: ") as caught:
        prepare(vllm_runtime, TextOperation.MESSAGES, thread={"type": "create"})
    assert caught.value.details is not None
    assert caught.value.details["error_code"] == "thread_unsupported_request"


@pytest.mark.parametrize(
    ("operation", "tools"),
    [
        (TextOperation.CHAT, [{"type": "function", "function": {"name": "f"}}]),
        (TextOperation.RESPONSES, [{"type": "function", "name": "f", "parameters": {}}]),
        (TextOperation.MESSAGES, [{"name": "f", "input_schema": {}}]),
    ],
)
async def test_tools_need_a_parser(
    vllm_runtime: VllmRuntime, operation: TextOperation, tools: list[Any]
) -> None:
    model = ModelConfig(id="m", source="starter:tiny-llama")
    body = {**LEAST[operation], "tools": tools}
    with pytest.raises(InvalidRequest, match="tool_call_parser") as caught:
        vllm_runtime.prepare(model, TextRequest("m", operation, body, "test"))
    assert caught.value.param == "tools"


async def test_the_assistants_own_text_comes_back_without_a_type(
    vllm_runtime: VllmRuntime,
) -> None:
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "one"}]}
    payload = prepare(vllm_runtime, TextOperation.RESPONSES, input=[*ASK, said, *ASK])
    assert payload.input[1].content[0].text == "one"


@pytest.mark.parametrize(
    "thinking", [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}]
)
async def test_a_model_without_thoughts_is_not_asked_for_them(
    vllm_runtime: VllmRuntime, thinking: dict[str, Any]
) -> None:
    payload = prepare(vllm_runtime, TextOperation.MESSAGES, thinking=thinking, max_tokens=2048)
    assert payload.thinking is None


WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}
ADDED: Any = {
    "role": "system",
    "content": [
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": WEATHER}}
    ],
}


@pytest.mark.parametrize("operation", [TextOperation.MESSAGES, TextOperation.COUNT_TOKENS])
async def test_a_message_has_the_tool_that_it_must_call(
    vllm_runtime: VllmRuntime, operation: TextOperation
) -> None:
    other = {"type": "tool", "name": "news"}
    param = refused(vllm_runtime, operation, tools=[WEATHER], tool_choice=other)
    assert param == "tool_choice.name"
    assert refused(vllm_runtime, operation, tool_choice=other) == "tool_choice.name"
    assert refused(vllm_runtime, operation, tool_choice={"type": "any"}) == "tool_choice"
    prepare(vllm_runtime, operation, tool_choice={"type": "auto"})
    prepare(vllm_runtime, operation, messages=[*ASK, ADDED], tool_choice={"type": "any"})
    prepare(vllm_runtime, operation, tools=[WEATHER], tool_choice={"type": "any"})
    prepare(vllm_runtime, operation, tools=[WEATHER], tool_choice={**other, "name": "weather"})


@pytest.mark.parametrize("encoding", ["bytes", "bytes_only", "hex"])
async def test_an_embedding_is_written_as_a_document_can_hold_it(
    vllm_runtime: VllmRuntime, encoding: str
) -> None:
    operation = TextOperation.EMBEDDINGS
    assert refused(vllm_runtime, operation, encoding_format=encoding) == "encoding_format"
    prepare(vllm_runtime, operation, encoding_format="base64")


async def test_thoughts_that_another_provider_encrypted(vllm_runtime: VllmRuntime) -> None:
    """They come from an earlier turn that the server kept. A client's own are refused later."""
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"}
    readable = {**thought, "content": [{"type": "reasoning_text", "text": "hm"}]}
    model = ModelConfig(id="m", source="starter:tiny-llama")
    body = {"input": [thought, readable, *ASK]}
    request = TextRequest("m", TextOperation.RESPONSES, body, "test", history=2)
    kept, own = vllm_runtime.prepare(model, request).payload.input
    assert kept.encrypted_content is None
    assert kept.content[0].text == "hm"
    assert own["content"] == "hi"
