"""Kokoro's voices: their files, other names for them, and blends of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import InvalidRequest
from engine.runtimes.kokoro.languages import LANGUAGES

VOICES_FOLDER = "voices"
"""Where the files of the voices are in a model's folder."""

MAX_BLEND = 8

OPENAI_VOICES = {
    "alloy": "af_alloy",
    "ash": "am_adam",
    "ballad": "bm_george",
    "coral": "af_bella",
    "echo": "am_echo",
    "fable": "bm_fable",
    "onyx": "am_onyx",
    "nova": "af_nova",
    "sage": "af_sarah",
    "shimmer": "af_sky",
    "verse": "am_michael",
    "marin": "af_heart",
    "cedar": "am_michael",
}
"""Six of OpenAI's names are Kokoro's too. The others stand for a voice of the same kind."""

_BLEND_PART = re.compile(r"([A-Za-z0-9_-]+)(?:\((\d{1,6}(?:\.\d{1,6})?)\))?")

Blend = tuple[tuple[str, float], ...]
"""Voices and their weights."""


def parse_blend(text: str) -> Blend | None:
    """`a+b` or `a(2)+b(1)` as voices and weights above zero; None if it is not of that form."""
    parts = [_BLEND_PART.fullmatch(part.strip()) for part in text.split("+")]
    blend = tuple((part[1], float(part[2] or 1)) for part in parts if part is not None)
    good = len(blend) == len(parts) <= MAX_BLEND and all(weight > 0 for _, weight in blend)
    return blend if good else None


def voice_files(folder: Path) -> dict[str, Path]:
    """The voices of a model's folder by name."""
    return {path.stem: path for path in sorted((folder / VOICES_FOLDER).glob("*.pt"))}


def find_voices(blend: Blend, files: Mapping[str, Path]) -> tuple[tuple[Path, float], ...]:
    """The files of a blend.

    Raises:
        InvalidRequest: there is no such voice.

    """
    for name, _ in blend:
        if name not in files:
            raise no_voice(name, files)
    return tuple((files[name], weight) for name, weight in blend)


def language_of(voice: str) -> str | None:
    """The language in a voice's name, as in `af_heart`; None if it has none."""
    return LANGUAGES.get(voice[:1]) if voice[2:3] == "_" else None


def no_voice(name: str, files: Mapping[str, Path] | None) -> InvalidRequest:
    """The error for a voice that is not in `files`. None: the files are not here."""
    some = sorted(files or ())[:8]
    known = f" There is {', '.join(some)}{', …' if len(files or ()) > 8 else ''}." if some else ""
    return InvalidRequest(f"There is no voice {name[:100]!r}.{known}", param="voice")
