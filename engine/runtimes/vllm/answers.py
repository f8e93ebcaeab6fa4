"""What vLLM's answers lack, put right before they are written.

Importing this module imports vLLM.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse


def complete_answer(answer: Any) -> None:
    """Correct a whole answer in place.

    A chat that made no call has not ended for its calls: vLLM says so of each `required` call that
    nobody could read.
    """
    if not isinstance(answer, ChatCompletionResponse):
        return
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls" and not choice.message.tool_calls:
            choice.finish_reason = "stop"


def answer_messages() -> None:
    """Have vLLM write a message whatever the model wrote. Call once, before the first engine.

    Anthropic's `input` of a call is an object. vLLM answered 400 if the model's arguments were
    none, as those of a call that `max_tokens` cut. The id has Anthropic's form.
    """
    convert = AnthropicServingMessages.messages_full_converter

    @functools.wraps(convert)
    def converted(self: Any, answer: ChatCompletionResponse) -> Any:
        complete_answer(answer)
        message = answer.choices[0].message
        calls = message.tool_calls
        message.tool_calls = [call for call in calls if _is_object(call.function.arguments)]
        if not message.tool_calls and not message.content and calls:
            message.content = calls[0].function.arguments
        result = convert(self, answer)
        result.id = f"msg_{result.id.removeprefix('chatcmpl-')}"
        return result

    AnthropicServingMessages.messages_full_converter = converted


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
