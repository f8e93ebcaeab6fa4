"""What the configuration says of a speech model."""

from __future__ import annotations

from pydantic import Field

from engine.section import Section


class SpeechOptions(Section):
    """Options of a speech model."""

    voice: str | None = None
    """The voice of requests that name none. By default the model's first."""
    voices: dict[str, str] = Field(default_factory=dict)
    """Further names for the model's voices, such as OpenAI's `alloy`."""
    language: str | None = None
    """The language of requests that name none, ISO 639-1. By default the model's first."""
    max_chars: int = Field(default=4096, ge=1, le=10_000_000)
    """Limit for one request. 4096 is OpenAI's."""
    revision: str | None = None


class SentenceOptions(SpeechOptions):
    """Options of a model that speaks sentence by sentence."""

    sentence_chars: int = Field(default=200, ge=20, le=1000)
    """A sentence longer than this is spoken in pieces."""
