"""What a speech model is to speak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is to be spoken, as the model knows it."""

    sentences: tuple[str, ...]
    voice: str | None
    """By the model's own name; None for a model of one voice, and where a sample is cloned."""
    language: str | None
    """By the model's own name."""
    seed: int
