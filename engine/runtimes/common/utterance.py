"""What a speech model is to speak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Utterance:
    """The text to speak, in the model's own terms."""

    sentences: tuple[str, ...]
    voice: str | None
    """The model's name of the voice. None for a model with one voice, and for a cloned voice."""
    language: str | None
    """The model's name of the language."""
    seed: int
