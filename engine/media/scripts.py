"""Which scripts a text is written in, and which a language uses.

A voice that speaks one language names the letters of another script, spells them or makes noise.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

LATIN = "LATIN"

SYMBOLS = frozenset({"CYRILLIC", "GREEK", "HEBREW"})
"""Scripts whose single letters are symbols in any text, such as `π`."""

LATIN_LANGUAGES = frozenset(
    [
        "af",
        "ca",
        "cs",
        "cy",
        "da",
        "de",
        "en",
        "es",
        "et",
        "eu",
        "fi",
        "fr",
        "ga",
        "gl",
        "hr",
        "hu",
        "id",
        "is",
        "it",
        "lt",
        "lv",
        "ms",
        "mt",
        "nl",
        "no",
        "pl",
        "pt",
        "ro",
        "sk",
        "sl",
        "sq",
        "sv",
        "sw",
        "tr",
        "vi",
    ]
)

_OTHERS = {
    "ARABIC": "ar fa ur",
    "BENGALI": "bn",
    "CYRILLIC": "be bg mk ru sr uk",
    "DEVANAGARI": "hi mr ne",
    "GEORGIAN": "ka",
    "GREEK": "el",
    "HANGUL": "ko",
    "HEBREW": "he",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "ja ko zh yue",
    "BOPOMOFO": "zh",
    "TAMIL": "ta",
    "THAI": "th",
}
_LANGUAGES = {script: frozenset(codes.split()) for script, codes in _OTHERS.items()}


@dataclass(frozen=True, slots=True)
class ForeignText:
    """Letters of a script that is not the language's."""

    text: str
    script: str
    """By the name of its letters in Unicode."""

    @property
    def languages(self) -> frozenset[str]:
        """Languages that use the script, ISO 639-1; none if it is a rare one."""
        return _LANGUAGES.get(self.script, frozenset())


def find_foreign(
    text: str, languages: Collection[str], also: Collection[str] = ()
) -> ForeignText | None:
    """The first letters of a script that none of the languages (ISO 639-1) uses.

    Every language uses Latin letters too, and those of the scripts `also`. None if there are no
    such letters, or if a language is not known here.
    """
    if not languages or not all(_is_known(language) for language in languages):
        return None
    used = {LATIN, *also, *(script for language in languages for script in _scripts(language))}
    letters = ((character, _script(character)) for character in text)
    for script, run in groupby(letters, key=lambda each: each[1]):
        if script is None or script in used:
            continue
        found = "".join(character for character, _ in run)
        if len(found) > 1 or script not in SYMBOLS:
            return ForeignText(found, script)
    return None


def _is_known(language: str) -> bool:
    return language in LATIN_LANGUAGES or any(_scripts(language))


def _scripts(language: str) -> Iterator[str]:
    return (script for script, languages in _LANGUAGES.items() if language in languages)


def _script(character: str) -> str | None:
    """The script of a letter; None for what is no letter, or belongs to every script."""
    if character.isascii():
        return LATIN if character.isalpha() else None
    # A letter in another form, such as full width, counts as the letter itself.
    letter = unicodedata.normalize("NFKC", character)[:1]
    if unicodedata.category(letter) not in ("Lu", "Ll", "Lt", "Lo"):
        return None
    return unicodedata.name(letter, "").partition(" ")[0] or None
