"""A request as Kokoro's thread needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.runtimes.kokoro.voices import Blend


@dataclass(frozen=True, slots=True)
class Utterance:
    """The text to speak, and how."""

    sentences: tuple[str, ...]
    language: str
    """One of the values of `LANGUAGES`."""
    blend: Blend
    voices: tuple[tuple[Path, float], ...]
    """The files of `blend`. Empty as long as the model's files are not here."""
    speed: float
    seed: int
    word_times: bool
