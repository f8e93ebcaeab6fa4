"""The scripts of a text, and those of languages."""

from __future__ import annotations

import pytest

from engine.media.scripts import ForeignText, find_foreign


@pytest.mark.parametrize(
    ("text", "languages", "found"),
    [
        ("Hello, world! 12:30 – “café”", ["en"], None),
        ("Straße, œuvre, ñandú, İstanbul, Łódź", ["en"], None),
        ("π ≈ 3.14, Ω, μm, µm, x², №5, ½, ℃, Ⅳ", ["en"], None),
        ("ＡＢＣ", ["en"], None),
        ("[word](/wˈɜɹd θˈɪŋ/)", ["en"], None),
        ("Hello 日本 there", ["en"], ForeignText("日本", "CJK")),
        ("日", ["en"], ForeignText("日", "CJK")),
        ("Привет, мир", ["en"], ForeignText("Привет", "CYRILLIC")),
        ("Привет, мир", ["ru"], None),
        ("Привет, world", ["uk"], None),
        ("カタカナ、ひらがな、漢字、Latin", ["ja"], None),
        ("ひらがな", ["zh"], ForeignText("ひらがな", "HIRAGANA")),
        ("한국어", ["ko"], None),
        ("한국어", ["en"], ForeignText("한국어", "HANGUL")),
        ("สวัสดี", ["en", "zh", "ru"], ForeignText("สว", "THAI")),
        ("Ꮳ", ["en"], ForeignText("Ꮳ", "CHEROKEE")),
        ("日本", ["tlh"], None),
        ("日本", [], None),
        ("日本", ["en", "ja"], None),
    ],
)
def test_the_first_foreign_letters(
    text: str, languages: list[str], found: ForeignText | None
) -> None:
    assert find_foreign(text, languages) == found


def test_further_scripts_may_be_allowed() -> None:
    assert find_foreign("नमस्ते", ["en"], also=["DEVANAGARI"]) is None


def test_which_languages_use_a_script() -> None:
    found = find_foreign("漢字", ["en"])
    assert found is not None and {"ja", "zh"} <= found.languages
