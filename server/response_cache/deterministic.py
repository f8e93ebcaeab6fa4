"""Which requests have one answer, so that it may be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import (
    READING,
    ImageRequest,
    Request,
    SpeechRequest,
    TextOperation,
    TextRequest,
    TranscriptionRequest,
)
from engine.runtimes.registry import runtime_class
from server.media import check_media_urls

MAX_UPLOAD_BYTES = 32 * 2**20
"""Of all files of a request together. The answer to more is not kept."""

_SAMPLED = frozenset(
    {
        TextOperation.CHAT,
        TextOperation.COMPLETION,
        TextOperation.RESPONSES,
        TextOperation.MESSAGES,
    }
)

_STATEFUL = (
    "background",
    "container",
    "conversation",
    "mcp_servers",
    "previous_response_id",
    "store",
    "web_search_options",
)
"""Fields by which an answer depends on more than the request, or leaves something behind."""

_CLIENT_TOOLS = frozenset({"custom", "function", "namespace"})
"""Types of tools that the client runs. What a hosted tool finds changes."""


def is_deterministic(request: Request, models: Sequence[ModelConfig]) -> bool:
    """Whether each of the models, any of which may answer, gives equal requests equal answers."""
    match request:
        case TextRequest() if request.operation in READING:
            return _is_complete(request.body)
        case TextRequest():
            return request.operation in _SAMPLED and _is_fixed(request.body)
        case ImageRequest():
            return request.seed is not None
        case SpeechRequest():
            return request.seed is not None or all(
                runtime_class(model.runtime).repeats_itself for model in models
            )
        case TranscriptionRequest():
            return request.temperature == 0
    return False  # a video is a job


def _is_fixed(body: Mapping[str, Any]) -> bool:
    if not _is_number(body.get("seed"), int) and not (
        _is_number(body.get("temperature"), int | float) and body["temperature"] == 0
    ):
        return False
    if any(body.get(name) for name in _STATEFUL) or isinstance(body.get("prompt"), dict):
        return False  # a prompt that is an object is one that a provider keeps
    tools = body.get("tools")
    hosted = isinstance(tools, list) and not all(map(_is_run_by_the_client, tools))
    return not hosted and _is_complete(body)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_run_by_the_client(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("type", "custom") in _CLIENT_TOOLS


def _is_complete(body: Mapping[str, Any]) -> bool:
    """Whether the body has all its media. What is behind a URL changes."""
    try:
        check_media_urls(body, ())
    except InvalidRequest:
        return False
    return True


def upload_bytes(value: Any) -> int:
    """The bytes of all files in the fields of a form."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(upload_bytes, value.values()))
    return sum(map(upload_bytes, value)) if isinstance(value, list) else 0
