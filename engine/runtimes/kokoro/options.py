"""What the configuration says of a Kokoro model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from engine.runtimes.kokoro.languages import NEEDS_PACKAGES, find_language, spoken_languages
from engine.runtimes.kokoro.voices import OPENAI_VOICES, language_of, parse_blend
from engine.section import Section


class KokoroOptions(Section):
    """Options of a Kokoro model."""

    voice: str = "af_heart"
    """The voice of requests that name none: a voice, an alias or a blend."""
    voices: dict[str, str] = Field(default_factory=dict)
    """Further names for voices or blends, beside those of `OPENAI_VOICES`."""
    dtype: Literal["float32"] = "float32"
    """The vocoder's Fourier transform knows no half precision."""
    language: str = "en-us"
    """The language of voices whose name has none."""
    languages: dict[str, str] = Field(default_factory=dict)
    """The language of a voice, where it is not the one in the voice's name."""
    max_chars: int = Field(default=4096, ge=1, le=10_000_000)
    """Limit for one request. 4096 is OpenAI's."""
    revision: str | None = None

    @field_validator("language")
    @classmethod
    def _language_is_known(cls, value: str) -> str:
        return _known_language(value)

    @field_validator("languages")
    @classmethod
    def _languages_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        return {voice: _known_language(language) for voice, language in value.items()}

    @field_validator("voices")
    @classmethod
    def _voices_are_blends(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            if parse_blend(name) is None:
                raise ValueError(f"{name!r} is neither a voice nor a blend")
        return value

    def resolve(self, name: str) -> str:
        """The voice or blend that a name stands for. Most names stand for themselves."""
        return self.voices.get(name) or OPENAI_VOICES.get(name) or name

    def language_of(self, voice: str) -> str | None:
        """The language of a voice: as configured, otherwise in its name; None if it has none."""
        return self.languages.get(voice) or language_of(voice)


def _known_language(name: str) -> str:
    known = find_language(name, "en-us")
    if known is None or known in NEEDS_PACKAGES:
        raise ValueError(f"no language {name!r}; there is {', '.join(spoken_languages())}")
    return known
