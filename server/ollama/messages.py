"""Ollama's messages, as OpenAI's."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest
from server.schemas.ollama import OllamaMessage, OllamaToolCall

_SIGNATURES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
    (b"BM", "image/bmp"),
)
"""How files of pictures begin."""


def openai_messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """The messages of a chat in OpenAI's form.

    Ollama's calls may have no ids, and a tool's message names its function or nothing. Such a
    message belongs to the first call before it that has no answer yet.

    Raises:
        InvalidRequest: naming what cannot be read.

    """
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        content: Any = message.content or ""
        if message.images:
            content = with_images(content, message.images, f"messages[{index}].images")
        each: dict[str, Any] = {"role": message.role, "content": content}
        if message.thinking:
            each["reasoning"] = message.thinking
        if message.tool_calls:
            calls = [
                _call(call, f"call_{index}_{place}")
                for place, call in enumerate(message.tool_calls)
            ]
            each["tool_calls"] = calls
            open_calls += [(call["id"], call["function"]["name"]) for call in calls]
        if message.role == "tool":
            each["tool_call_id"] = _answered(message, open_calls) or f"call_{index}"
        found.append(each)
    return found


def with_images(text: str, images: Sequence[str], param: str) -> list[dict[str, Any]]:
    """The content of a message with pictures, which are base64 or `data:` URLs.

    Raises:
        InvalidRequest: naming the picture that is neither.

    """
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(each, f"{param}[{index}]")}}
        for index, each in enumerate(images)
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _data_url(image: str, param: str) -> str:
    if image.startswith("data:"):
        return image
    try:
        content = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("A picture is written as base64.", param=param) from error
    kind = next((kind for start, kind in _SIGNATURES if content.startswith(start)), None)
    if kind is None:
        raise InvalidRequest("It is no PNG, JPEG, GIF, WebP or BMP.", param=param)
    return f"data:{kind};base64,{image}"


def _call(call: OllamaToolCall, default_id: str) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments or {}, ensure_ascii=False)
    return {
        "id": call.id or default_id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _answered(message: OllamaMessage, open_calls: list[tuple[str, str]]) -> str | None:
    """The id of the call that a tool's message answers. The call is open no more."""
    name = message.tool_name or message.name
    if message.tool_call_id is not None:
        open_calls[:] = [each for each in open_calls if each[0] != message.tool_call_id]
        return message.tool_call_id
    for place, (call_id, function) in enumerate(open_calls):
        if name in (None, function):
            del open_calls[place]
            return call_id
    return None
