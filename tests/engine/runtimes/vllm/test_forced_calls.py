"""Tool calls that a request forces: they validate, streamed and whole, in every API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Document, Event
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.runtimes.vllm.tool_choice import narrow_to_allowed
from tests.engine.conftest import MakeModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

Call = tuple[str, str]
Ask = Callable[..., Any]

POINT = {"$defs": {"Unit": {"enum": ["c", "f"]}}, "type": "object"}
TOOLS: dict[str, dict[str, Any] | None] = {
    "weather": {
        **POINT,
        "properties": {"days": {"type": "integer"}, "unit": {"$ref": "#/$defs/Unit"}},
        "required": ["days", "unit"],
    },
    "move": {
        # Another tool's definition of the same name.
        **POINT,
        "$defs": {"Unit": {"enum": ["m"]}},
        "properties": {"by": {"type": "integer"}, "unit": {"$ref": "#/$defs/Unit"}},
        "required": ["by", "unit"],
    },
    "now": None,
}


def body(operation: TextOperation, choice: str, tools: Any = TOOLS, **more: Any) -> dict[str, Any]:
    """A request that forces a call: of any tool, or of the one named."""
    ask = [{"role": "user", "content": "hi"}]
    if operation is TextOperation.MESSAGES:
        return {
            "messages": ask,
            "max_tokens": 200,
            "tools": [
                {"name": name, "input_schema": schema or {"type": "object", "properties": {}}}
                for name, schema in tools.items()
            ],
            "tool_choice": {"type": "any"}
            if choice == "required"
            else {"type": "tool", "name": choice},
            **more,
        }
    functions = [
        {"name": name, **({"parameters": schema} if schema else {})}
        for name, schema in tools.items()
    ]
    if operation is TextOperation.RESPONSES:
        named: Any = {"type": "function", "name": choice}
        given = [{"type": "function", "parameters": None, **each} for each in functions]
        own: Any = {"input": "hi", "max_output_tokens": 200}
    else:
        named = {"type": "function", "function": {"name": choice}}
        given = [{"type": "function", "function": each} for each in functions]
        own = {"messages": ask, "max_tokens": 200}
    wanted = choice if choice == "required" else named
    return {**own, "tools": given, "tool_choice": wanted, **more}


def read(operation: TextOperation, events: list[Event]) -> tuple[str | None, list[Call]]:
    """Why the answer ended, and its calls."""
    if isinstance(events[0], Document):
        document = json.loads(events[0].body)
        if operation is TextOperation.CHAT:
            (choice,) = document["choices"]
            made = [call["function"] for call in choice["message"].get("tool_calls") or []]
            return choice["finish_reason"], [(each["name"], each["arguments"]) for each in made]
        if operation is TextOperation.RESPONSES:
            made = [item for item in document["output"] if item["type"] == "function_call"]
            return document["status"], [(each["name"], each["arguments"]) for each in made]
        made = [block for block in document["content"] if block["type"] == "tool_use"]
        return document["stop_reason"], [(e["name"], json.dumps(e["input"])) for e in made]
    return _read_stream(operation, events)


def _read_stream(operation: TextOperation, events: list[Event]) -> tuple[str | None, list[Call]]:
    end: str | None = None
    calls: dict[int, list[str]] = {}
    for event in events:
        for line in event.data.splitlines():  # type: ignore[union-attr]
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            if operation is TextOperation.CHAT:
                for choice in data["choices"]:
                    end = choice["finish_reason"] or end
                    for piece in choice["delta"].get("tool_calls") or []:
                        call = calls.setdefault(piece["index"], ["", ""])
                        call[0] += piece["function"].get("name") or ""
                        call[1] += piece["function"].get("arguments") or ""
            elif data["type"] == "response.output_item.done":
                if data["item"]["type"] == "function_call":
                    item = data["item"]
                    calls[data["output_index"]] = [item["name"], item["arguments"]]
            elif data["type"] == "content_block_start":
                if data["content_block"]["type"] == "tool_use":
                    calls[data["index"]] = [data["content_block"]["name"], ""]
            elif data["type"] == "content_block_delta":
                if data["delta"]["type"] == "input_json_delta":
                    calls[data["index"]][1] += data["delta"]["partial_json"]
            elif data["type"] == "message_delta":
                end = data["delta"]["stop_reason"]
            elif data["type"] in {"response.completed", "response.incomplete"}:
                assert data["type"] == f"response.{data['response']['status']}"
                end = data["response"]["status"]
    return end, [(name, arguments) for name, arguments in calls.values()]


def valid(call: Call, tools: Any = TOOLS) -> bool:
    name, arguments = call
    schema = tools[name]
    jsonschema.validate(json.loads(arguments), schema or {"type": "object", "maxProperties": 0})
    return True


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen"])
def starter(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ask(vllm_runtime: VllmRuntime, make_model: MakeModel, starter: str) -> AsyncIterator[Ask]:
    """Ask one loaded model, and read its answer."""
    parser = "llama3_json" if starter == "tiny-llama" else "hermes"
    model = make_model(starter, starter, max_model_len=2048, tool_call_parser=parser)
    loaded = await vllm_runtime.load(model, lambda _: None)

    async def answer(operation: TextOperation, fields: dict[str, Any]) -> Any:
        request = TextRequest(model.id, operation, fields, request_id="test")
        prepared = vllm_runtime.prepare(model, request)
        answer.events = [event async for event in loaded.run(prepared)]  # type: ignore[attr-defined]
        return read(operation, answer.events)  # type: ignore[attr-defined]

    yield answer
    await vllm_runtime.unload(loaded)


APIS = [TextOperation.CHAT, TextOperation.RESPONSES, TextOperation.MESSAGES]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("operation", APIS)
async def test_forced_calls_validate(ask: Ask, operation: TextOperation, stream: bool) -> None:
    for choice in ("required", "weather", "now"):
        end, calls = await ask(operation, body(operation, choice, stream=stream))
        if end in {"length", "incomplete", "max_tokens"} and len(calls) > 1:
            calls.pop()  # the last one was cut
        assert calls
        assert all(valid(call) for call in calls)
        if choice != "required":
            assert [name for name, _ in calls] == [choice]


EITHER = {
    "type": "object",
    "properties": {"day": {"enum": ["today"]}, "place": {"enum": ["here"]}},
    "additionalProperties": False,
    "anyOf": [{"required": ["day"]}, {"required": ["place"]}],
}


async def test_rules_that_the_usual_backend_ignores_are_kept(ask: Ask) -> None:
    for choice in ("required", "either"):
        for seed in range(4):
            fields = body(TextOperation.CHAT, choice, {"either": EITHER}, seed=seed)
            _, calls = await ask(TextOperation.CHAT, fields)
            assert calls and all(valid(call, {"either": EITHER}) for call in calls)


async def test_a_rule_that_no_backend_knows_is_named(ask: Ask) -> None:
    schema = {**EITHER, "dependentRequired": {"day": ["place"]}}
    with pytest.raises(InvalidRequest, match="dependentRequired") as caught:
        await ask(TextOperation.CHAT, body(TextOperation.CHAT, "required", {"either": schema}))
    assert caught.value.param == "tools"


async def test_an_answer_without_calls_has_not_ended_for_its_calls(ask: Ask) -> None:
    for stream in (False, True):
        fields = body(TextOperation.CHAT, "required", max_tokens=2, stream=stream)
        end, calls = await ask(TextOperation.CHAT, fields)
        assert (end, calls) == ("length", [])
        fields = body(TextOperation.CHAT, "required", stop=["["], stream=stream)
        end, calls = await ask(TextOperation.CHAT, fields)
        assert (end, calls) == ("stop", [])


async def test_a_call_that_a_stop_string_cut_is_not_to_be_run(ask: Ask) -> None:
    """Its arguments have begun."""
    for choice in ("move", "required"):
        for stream in (False, True):
            fields = body(TextOperation.CHAT, choice, {"move": TOOLS["move"]}, stop=['"by"'])
            fields |= {"stream": stream, "include_stop_str_in_output": True}
            end, calls = await ask(TextOperation.CHAT, fields)
            assert end == "stop"
            assert bool(calls) is stream
            assert all(arguments.endswith('"by"') for _, arguments in calls)


async def test_the_whole_calls_stay_where_the_last_is_cut(vllm_runtime: VllmRuntime) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    from engine.runtimes.vllm.answers import complete_answer, completed_chunks

    def call(index: int, arguments: str) -> dict[str, Any]:
        return {"index": index, "id": "c", "function": {"name": "f", "arguments": arguments}}

    message = {"role": "assistant", "tool_calls": [call(0, "{}"), call(1, '{"a"')]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    chat = ChatCompletionResponse.model_validate(
        {"model": "m", "choices": [choice], "usage": usage}
    )
    complete_answer(chat, {})
    (told,) = chat.choices
    assert [each.function.arguments for each in told.message.tool_calls] == ["{}"]
    assert told.finish_reason == "tool_calls"

    async def end(*arguments: str) -> str:
        async def chunks() -> AsyncIterator[str]:
            for each in arguments:
                choice: Any = {"index": 0, "delta": {"tool_calls": [call(0, each)]}}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            choice = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        *_, last, done = [chunk async for chunk in completed_chunks(chunks())]
        assert done == "data: [DONE]\n\n"
        reason: str = json.loads(last[6:])["choices"][0]["finish_reason"]
        return reason

    assert await end('{"a"', ": 1}") == "tool_calls"
    assert await end('{"a"', ": 1") == "stop"


@pytest.mark.parametrize("choice", ["required", "weather"])
async def test_a_cut_call_is_no_error_of_the_client(ask: Ask, choice: str) -> None:
    end, calls = await ask(
        TextOperation.MESSAGES, body(TextOperation.MESSAGES, choice, max_tokens=6)
    )
    assert (end, calls) == ("max_tokens", [])


@pytest.mark.parametrize("operation", [TextOperation.CHAT, TextOperation.RESPONSES])
async def test_only_allowed_tools_are_called(ask: Ask, operation: TextOperation) -> None:
    nested = operation is TextOperation.CHAT
    tool: Any = {
        "type": "function",
        **({"function": {"name": "now"}} if nested else {"name": "now"}),
    }
    allowed: Any = {"mode": "required", "tools": [tool]}
    choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if nested else allowed)}
    fields = {**body(operation, "required"), "tool_choice": choice}
    _, calls = await ask(operation, fields)
    assert {name for name, _ in calls} == {"now"}


@pytest.mark.parametrize(
    ("allowed", "param"),
    [
        ({"mode": "none", "tools": [{"type": "function", "name": "now"}]}, "tool_choice.mode"),
        ({"mode": "auto", "tools": []}, "tool_choice.tools"),
        ({"mode": "auto", "tools": [{"type": "function", "name": "x"}]}, "tool_choice.tools[0]"),
    ],
)
async def test_wrong_allowed_tools_are_named(allowed: dict[str, Any], param: str) -> None:
    fields = body(TextOperation.RESPONSES, "required")
    fields["tool_choice"] = {"type": "allowed_tools", **allowed}
    with pytest.raises(InvalidRequest) as caught:
        narrow_to_allowed(fields)
    assert caught.value.param == param


async def test_every_parser_takes_forced_calls_so(vllm_runtime: VllmRuntime) -> None:
    """Those of vLLM that read a whole answer themselves at least bind the arguments."""
    from vllm.parser import ParserManager
    from vllm.tool_parsers import ToolParserManager

    from engine.runtimes.vllm.forced_calls import CompleteCalls, JsonForcedCalls

    own = {"cohere_command3", "cohere_command4", "kimi_k3", "minicpmv"}
    for name in {*ToolParserManager.list_registered()} - {"hf"}:
        try:
            parser = ParserManager.get_parser(name, None, enable_auto_tools=True)
        except ImportError:  # a package of the parser's own is not installed
            continue
        assert parser is not None
        assert issubclass(parser, CompleteCalls if name in own else JsonForcedCalls), name


class Parsing:
    """One of vLLM's parsers with the tools of this file."""

    def __init__(self, runtime: VllmRuntime, model: ModelConfig, choice: Any) -> None:
        from transformers import AutoTokenizer
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        self.tokenizer = AutoTokenizer.from_pretrained(runtime._folder(model))
        tools = body(TextOperation.CHAT, "now")["tools"]
        fields = {"messages": [], "model": "q", "tools": tools, "tool_choice": choice}
        self.request = ChatCompletionRequest.model_validate(fields)
        self.parser_class: Any = ParserManager.get_parser("hermes", None, enable_auto_tools=True)

    def whole(self, text: str) -> list[Call]:
        parser = self.parser_class(self.tokenizer, self.request.tools)
        _, _, calls = parser.parse(text, self.request, enable_auto_tools=True)
        return [(call.name, call.arguments) for call in calls or ()]

    def stream(self, text: str) -> list[Call]:
        parser = self.parser_class(self.tokenizer, self.request.tools)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        calls: dict[int, list[str]] = {}
        for index, token in enumerate(ids):
            finished = index == len(ids) - 1
            piece = self.tokenizer.decode([token])
            delta = parser.parse_delta(piece, [token], self.request, [], finished=finished)
            for call in delta.tool_calls if delta else ():
                known = calls.setdefault(call.index, ["", ""])
                known[0] += call.function.name or ""
                known[1] += call.function.arguments or ""
        return [(name, arguments) for name, arguments in calls.values()]


@pytest.fixture(scope="module")
def qwen(make_model: MakeModel) -> ModelConfig:
    return make_model("q", "tiny-qwen")


async def test_a_cut_call_does_not_lose_the_whole_ones(
    vllm_runtime: VllmRuntime, qwen: ModelConfig
) -> None:
    parsing = Parsing(vllm_runtime, qwen, "required")
    cut = '[{"name": "now", "parameters": {}}, {"name": "move", "parameters": {"by": 1'
    calls = [("now", "{}"), ("move", '{"by": 1')]
    assert parsing.whole(cut) == calls
    assert parsing.stream(cut) == calls
    assert parsing.whole(cut[:45]) == calls[:1]
    assert parsing.stream(cut[:45]) == calls[:1]


async def test_a_message_leaves_a_cut_call_out(vllm_runtime: VllmRuntime) -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    def blocks(*arguments: str) -> list[tuple[str, Any]]:
        calls = [{"id": "c", "function": {"name": "f", "arguments": each}} for each in arguments]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        chat = {"model": "m", "choices": [choice], "usage": usage}
        answer = AnthropicServingMessages.messages_full_converter(
            None, ChatCompletionResponse.model_validate(chat)
        )
        return [(block.type, block.input or block.text) for block in answer.content]

    assert blocks('{"a": 1}', '{"a"') == [("tool_use", {"a": 1})]
    assert blocks('{"a"') == [("text", '{"a"')]
    assert blocks("[]") == [("text", "[]")]


async def test_a_streamed_call_of_a_tool_without_parameters_has_arguments(
    vllm_runtime: VllmRuntime, qwen: ModelConfig
) -> None:
    """Also a call that the model made without being forced, in its parser's format."""
    stream = Parsing(vllm_runtime, qwen, "auto").stream
    now = '<tool_call>\n{"name": "now"}\n</tool_call>'
    move = '<tool_call>\n{"name": "move"}\n</tool_call>'
    assert stream(now) == [("now", "{}")]
    assert stream(now + now) == [("now", "{}"), ("now", "{}")]
    # What the tool needs is not made up.
    assert stream(move) == [("move", "")]


async def test_a_message_has_an_id_of_anthropics_form(ask: Ask) -> None:
    for stream in (False, True):
        fields = body(TextOperation.MESSAGES, "now", stream=stream)
        await ask(TextOperation.MESSAGES, fields)
        first = ask.events[0]  # type: ignore[attr-defined]
        text = first.data if stream else first.body.decode()
        assert '"id":"msg_' in text


async def test_a_message_always_says_which_sequence_stopped_it(ask: Ask) -> None:
    await ask(TextOperation.MESSAGES, body(TextOperation.MESSAGES, "now"))
    document = json.loads(ask.events[0].body)  # type: ignore[attr-defined]
    assert document["stop_sequence"] is None


async def test_a_response_that_was_cut_is_incomplete(ask: Ask) -> None:
    for stream in (False, True):
        fields = {"input": "hi", "max_output_tokens": 2, "stream": stream}
        end, _ = await ask(TextOperation.RESPONSES, fields)
        assert end == "incomplete"
        events = ask.events  # type: ignore[attr-defined]
        text = events[-1].data.partition("data: ")[2] if stream else events[0].body.decode()
        document = json.loads(text)
        response = document["response"] if stream else document
        assert response["output"][-1]["status"] == "incomplete"
        assert response["tool_choice"] == "auto"
    ended = [json.loads(event.data.partition("data: ")[2]) for event in events]
    items = [each["item"] for each in ended if each["type"] == "response.output_item.done"]
    assert [item["status"] for item in items] == ["incomplete"]
    numbers = [each["sequence_number"] for each in ended]
    assert numbers == sorted(numbers)
    named = {event.data.partition("\n")[0] for event in ask.events}  # type: ignore[attr-defined]
    assert "event: response.incomplete" in named
    assert "event: response.completed" not in named


async def test_tokens_beyond_the_vocabulary_are_refused(ask: Ask) -> None:
    operation = TextOperation.DETOKENIZE
    with pytest.raises(InvalidRequest, match="whose last is") as caught:
        await ask(operation, {"tokens": [10**12]})
    last = int(caught.value.message.rstrip(".").rpartition(" ")[2])
    assert caught.value.param == "tokens"
    for tokens in ([1, last + 1], [last + 2, last]):
        with pytest.raises(InvalidRequest) as caught:
            await ask(operation, {"tokens": tokens})
        assert caught.value.param == "tokens"
    with pytest.raises(KeyError, match="content"):  # an answer, which is no message
        await ask(operation, {"tokens": [1, last]})
    assert json.loads(ask.events[0].body)["prompt"]  # type: ignore[attr-defined]
