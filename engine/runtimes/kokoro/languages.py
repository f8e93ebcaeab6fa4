"""The languages that Kokoro speaks."""

from __future__ import annotations

LANGUAGES = {
    "a": "en-us",
    "b": "en-gb",
    "e": "es",
    "f": "fr-fr",
    "h": "hi",
    "i": "it",
    "j": "ja",
    "p": "pt-br",
    "z": "zh",
}
"""By the first letter of a voice's name, as in `af_heart`."""


NEEDS_PACKAGES = ("ja", "zh")
"""Kokoro's languages whose phonemes need packages that Roundhouse does not bring."""


ESPEAK_SCRIPTS = ("DEVANAGARI", "HANGUL")
"""Scripts that espeak reads by itself within a text of another language."""


def find_language(asked: str, preferred: str) -> str | None:
    """Kokoro's language for an ISO 639-1 code with or without a region; None if it has none.

    `en` alone is `preferred` if that is English of either kind.
    """
    code = asked.lower().replace("_", "-")
    if code in LANGUAGES.values():
        return code
    primary = code.partition("-")[0]
    if preferred.partition("-")[0] == primary:
        return preferred
    return next((each for each in LANGUAGES.values() if each.partition("-")[0] == primary), None)


def spoken_languages() -> list[str]:
    """Those that need no further package."""
    return [each for each in LANGUAGES.values() if each not in NEEDS_PACKAGES]
