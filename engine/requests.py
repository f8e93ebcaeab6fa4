"""What a caller asks of the engine, and the events it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any


class Priority(IntEnum):
    """Order among waiting requests; lower is served first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class TextOperation(StrEnum):
    """What can be asked of a language or embedding model."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"
    EMBEDDINGS = "embeddings"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One request to a language or embedding model.

    `body` is the decoded JSON document as it came; the runtime checks it
    against its own wire schema (`Runtime.prepare`), because for text the wire
    format *is* the library's: vLLM parses and renders the OpenAI and Anthropic
    documents itself.
    """

    model: str
    operation: TextOperation
    body: Mapping[str, Any]
    request_id: str
    priority: Priority = Priority.NORMAL
    queue_timeout_s: float | None = None
    """Seconds to wait for a grant; None takes the configured default."""


@dataclass(frozen=True, slots=True)
class Document:
    """The whole answer as one JSON document (UTF-8)."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a streamed answer: complete server-sent-event text, ready for the wire."""

    data: str


Event = Document | Frame
"""A run yields either exactly one `Document` or one or more `Frame`s."""
