"""The rules for a chat's messages that vLLM leaves to the template, which takes most in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.words import echoed

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "audio", "reasoning",
                      "reasoning_content")  # fmt: skip
"""Fields of an assistant's message that may stand alone."""


def check_messages(messages: Any) -> None:
    """Check role, content and call of each message. `null` as an assistant's content is taken.

    Raises:
        InvalidRequest: naming the message and its field.

    """
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            continue  # the schema says so
        role = message["role"]
        if role not in ROLES:
            rule = f"{echoed(role)} is none of {', '.join(map(repr, ROLES))}"
            raise _wrong(index, "role", rule)
        alone = role == "assistant" and any(message.get(each) for each in INSTEAD_OF_CONTENT)
        if "content" not in message and not alone:
            raise _wrong(index, "content", "the field is required")
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise _wrong(index, "tool_call_id", "the field is required, a string")


def _wrong(index: int, field: str, rule: str) -> InvalidRequest:
    param = f"messages[{index}].{field}"
    return InvalidRequest(f"{param}: {rule}.", param=param)
