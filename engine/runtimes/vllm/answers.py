"""What vLLM's answers lack, put right before they are written.

Importing this module imports vLLM.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from engine.usage import Usage
from vllm.entrypoints.anthropic import serving as anthropic_serving
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    DeltaMessage,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponse,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo

MESSAGE_START = "event: message_start\ndata: "

STREAMED = (
    DeltaMessage,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
"""The schemas of streamed chunks, each after those of its parts."""


CACHED = '"cached_tokens":'
"""In the chunk with the usage. Quotes inside a JSON string are escaped: this finds a key only."""


def complete_answer(answer: Any, body: Mapping[str, Any], usage: Usage | None = None) -> None:
    """Correct a whole answer to `body` in place.

    A chat that made no call has not ended for its calls: vLLM says so of each `required` call that
    nobody could read. A call that a stop string cut goes, as nobody could run it. Of several
    prompts vLLM reports the cached tokens of one.
    """
    if isinstance(answer, ResponsesResponse):
        _complete_response(answer, body)
    if isinstance(answer, CompletionResponse) and usage is not None:
        details = answer.usage.prompt_tokens_details
        if details is not None:
            details.cached_tokens = usage.cached_tokens
    if not isinstance(answer, ChatCompletionResponse):
        return
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue  # the client gets what was written
        calls = choice.message.tool_calls
        choice.message.tool_calls = [each for each in calls if _is_object(each.function.arguments)]
        if choice.finish_reason == "tool_calls" and not choice.message.tool_calls:
            choice.finish_reason = "stop"


async def completion_chunks(chunks: AsyncIterator[str], usage: Usage) -> AsyncGenerator[str, None]:
    """The chunks of a streamed completion. Of several prompts vLLM reports the first one's."""
    async for chunk in chunks:
        if CACHED in chunk and chunk.startswith("data: {"):
            document = json.loads(chunk.removeprefix("data: "))
            details = (document.get("usage") or {}).get("prompt_tokens_details")
            if details:
                details["cached_tokens"] = usage.cached_tokens
            chunk = f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
        yield chunk


async def completed_chunks(chunks: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The chunks of a streamed chat with tools.

    A chat with a call that a stop string cut has not ended for its calls. What was written of the
    call is with the client already.
    """
    written: dict[tuple[int, int], str] = {}
    async for chunk in chunks:
        if '"tool_calls"' not in chunk or not chunk.startswith("data: {"):
            yield chunk
            continue
        document = json.loads(chunk.removeprefix("data: "))
        changed = False
        for choice in document.get("choices", ()):
            place = choice["index"]
            for call in choice["delta"].get("tool_calls") or ():
                key = place, call["index"]
                arguments = (call.get("function") or {}).get("arguments") or ""
                written[key] = written.get(key, "") + arguments
            if choice.get("finish_reason") == "tool_calls":
                own = [text for (index, _), text in written.items() if index == place]
                if not own or not all(map(_is_object, own)):
                    choice["finish_reason"], changed = "stop", True
        if changed:
            chunk = f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
        yield chunk


def _complete_response(response: ResponsesResponse, body: Mapping[str, Any]) -> None:
    """Echo the tool choice of the request, and mark the item that was cut.

    Without tools vLLM echoes `none`. It calls each item completed.
    """
    if not body.get("tools") and body.get("tool_choice") is None:
        response.tool_choice = "auto"
    if response.status == "incomplete" and response.output:
        _mark_cut(response.output[-1])


def _mark_cut(item: Any) -> None:
    """Mark the last item of a cut response, unless it is a call that is whole."""
    if item.type != "function_call" or not _is_object(item.arguments):
        item.status = "incomplete"


async def response_events(
    events: AsyncIterator[Any], body: Mapping[str, Any]
) -> AsyncGenerator[str, None]:
    """The events of a streamed response to `body` as texts, each corrected as a whole answer is.

    The end of an item waits for the next event, which may say that the item was cut.
    """
    ended: Any = None
    async for event in events:
        response = getattr(event, "response", None)
        if isinstance(response, ResponsesResponse):
            _complete_response(response, body)
            if response.status == "incomplete" and ended is not None:
                _mark_cut(ended.item)
        if ended is not None:
            yield _text(ended)
        ended = event if getattr(event, "type", "") == "response.output_item.done" else None
        if ended is None:
            yield _text(event)
    if ended is not None:
        yield _text(ended)


def _text(event: Any) -> str:
    """An event of the Responses API as the text of a server-sent event.

    vLLM says "completed" also of a response that was cut. Its errors are texts already.
    """
    if isinstance(event, str):
        return event
    kind = event.type
    if kind == "response.completed" and event.response.status == "incomplete":
        kind = "response.incomplete"
        event = event.model_copy(update={"type": kind})
    return f"event: {kind}\ndata: {event.model_dump_json(by_alias=True)}\n\n"


async def message_events(events: AsyncIterator[str], usage: Usage) -> AsyncGenerator[str, None]:
    """The events of a streamed message. Its id has Anthropic's form.

    vLLM says only at the end how many of the input tokens the cache had. Many clients read the
    first event.
    """
    async for event in events:
        if event.startswith(MESSAGE_START):
            document = json.loads(event.removeprefix(MESSAGE_START))
            message = document["message"]
            message["id"] = f"msg_{message['id'].removeprefix('chatcmpl-')}"
            counts = message["usage"]
            counts["input_tokens"] = max(0, counts["input_tokens"] - usage.cached_tokens)
            counts |= {
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens,
            }
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
            yield f"{MESSAGE_START}{text}\n\n"
        else:
            yield event


def write_chunks_unchecked() -> None:
    """Have vLLM not look for unknown fields in what it streams. Call once, before the first engine.

    The check is for requests: it logs their fields that no schema has. It took a fifth of the time
    in which a chunk is made, as each chunk has three parts.
    """
    for kind in STREAMED:
        kind.__pydantic_decorators__.model_validators.pop("__log_extra_fields__", None)
        kind.model_rebuild(force=True)


def answer_messages() -> None:
    """Have vLLM write a message whatever the model wrote. Call once, before the first engine.

    Anthropic's `input` of a call is an object. vLLM answered 400 if the model's arguments were
    none, as those of a call that `max_tokens` cut. The id has Anthropic's form.

    Tokens that the cache takes up cost nothing here, so they are input tokens like any other. vLLM
    would report nearly all of a prompt as `cache_creation_input_tokens`.
    """
    convert = AnthropicServingMessages.messages_full_converter

    @functools.wraps(convert)
    def converted(self: Any, answer: ChatCompletionResponse) -> Any:
        message = answer.choices[0].message
        calls = message.tool_calls
        complete_answer(answer, {})
        message.tool_calls = [call for call in calls if _is_object(call.function.arguments)]
        if not message.tool_calls and not message.content and calls:
            message.content = calls[0].function.arguments
        result = convert(self, answer)
        result.id = f"msg_{result.id.removeprefix('chatcmpl-')}"
        return result

    AnthropicServingMessages.messages_full_converter = converted
    build = anthropic_serving._build_anthropic_usage

    @functools.wraps(build)
    def built(usage: UsageInfo | None) -> Any:
        details = usage.prompt_tokens_details if usage is not None else None
        if usage is None or details is None:
            return build(usage)
        details = details.model_copy(update={"created_cache_tokens": 0})
        return build(usage.model_copy(update={"prompt_tokens_details": details}))

    anthropic_serving._build_anthropic_usage = built


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
