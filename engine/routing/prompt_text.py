"""The words of a request, whatever its form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.requests import (
    DiarizationRequest,
    Request,
    SpeechRequest,
    TextRequest,
    TranscriptionRequest,
)

_TEXTS = ("system", "instructions", "messages", "input", "prompt", "suffix")
"""Fields of a text request that hold words."""
_PARTS = ("content", "text", "input_text", "arguments", "output")
"""Fields of a message, or of a part of one, that hold words."""


def prompt_text(request: Request) -> str:
    """Everything in words that the model is given, one piece a line."""
    if isinstance(request, TextRequest):
        return "\n".join(
            text for field in _TEXTS for text in _words(request.body.get(field)) if text
        )
    if isinstance(request, SpeechRequest):
        return request.text
    if isinstance(request, TranscriptionRequest):
        return request.prompt or ""
    if isinstance(request, DiarizationRequest):
        return ""
    return request.prompt


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for field in _PARTS:
            yield from _words(value.get(field))
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)
