"""Splitting texts into sentences: what ends one, what does not, and what is too long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from engine.media import sentences
from engine.media.sentences import split_sentences

ROOT = Path(__file__).parents[3]

EXAMPLES = [
    ("en", ["Hello there.", "How are you?", "Fine!"]),
    ("en", ["Dr. Smith paid $3.50 at 5 p.m. on Jan. 5th.", "He left."]),
    ("en", ["Mr. J. R. R. Tolkien wrote it.", "Version 3.5.1 is out!", "See Fig. 3 and pp. 3-5."]),
    ("en", ["Take fruit, e.g. Apples or pears.", "The rest, i.e. The nuts, can wait."]),
    ("en", ['"Is it true?" she asked.', "It cost £1,000.50!", "In 1999.", "Yes."]),
    ("en", ["1. First item.", "2. Second item."]),
    ("en-gb", ["St. John met Prof. Lee.", "The U.S. Army came."]),
    ("es", ["Hola Sr. García.", "¿Cómo estás?", "Bien."]),
    ("fr", ["M. Dupont et Mme. Petit sont là.", "Il dort."]),
    ("pt-br", ["O Sr. Silva e a Dra. Costa.", "Bom."]),
    ("hi", ["नमस्ते।", "आप कैसे हैं?"]),
    ("de", ["Dr. Müller kam am 3. Mai.", "Das war es."]),
    ("th", ["เขาเกิด 3 ก.ค. ๒๕๖๐ พ.ศ. นี้ ดร. สมชายมา?", "ใช่ครับ"]),
    ("my", ["မင်္ဂလာပါ။", "နေကောင်းလား။"]),
    ("xx", ["Some words.", "In no language."]),
]


@pytest.mark.parametrize(("language", "sentences"), EXAMPLES)
def test_sentences_end_where_they_end(language: str, sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences), language, max_chars=400) == sentences


def test_sentences_without_spaces_between() -> None:
    found = split_sentences("こんにちは。元気ですか?はい。", "ja", max_chars=400)
    assert found == ["こんにちは。", "元気ですか?", "はい。"]


def test_white_space_is_one_space_and_an_empty_line_is_an_end() -> None:
    text = "  A title\n \nOne  line\nand\tanother.\r\n\r\nThe end\n"
    found = split_sentences(text, "en", max_chars=400)
    assert found == ["A title", "One line and another.", "The end"]


def test_what_says_nothing_goes_with_what_does() -> None:
    assert split_sentences("Wait. ... !!! Go.", "en", max_chars=400) == ["Wait. ... !!!", "Go."]
    assert split_sentences(" \n\n\t", "en", max_chars=400) == []
    assert split_sentences("", "en", max_chars=400) == []


def test_a_long_sentence_is_cut_at_commas_then_spaces_then_anywhere() -> None:
    assert split_sentences("one two, three 1,000 four five", "en", max_chars=22) == [
        "one two,",
        "three 1,000 four five",
    ]
    assert split_sentences("one two, three four, five", "en", max_chars=20) == [
        "one two, three four,",
        "five",
    ]
    assert split_sentences("one two three", "en", max_chars=8) == ["one two", "three"]
    assert split_sentences("one two three", "en", max_chars=7) == ["one two", "three"]
    assert split_sentences("abcdefgh", "en", max_chars=3) == ["abc", "def", "gh"]
    assert split_sentences("一二三，四五六", "zh", max_chars=5) == ["一二三，", "四五六"]
    assert split_sentences("សួស្តី។ បាទបាទ", "km", max_chars=10) == ["សួស្តី។", "បាទបាទ"]


def test_an_accent_stays_with_its_letter() -> None:
    assert split_sentences("abe\u0301cd", "en", max_chars=3) == ["ab", "e\u0301c", "d"]


WHOLE = {
    "th": "เด็กน้อยกำลังเดินไปโรงเรียนเก้าโมงๆนี้น้ำท่วมแม่น้ำเปิดประตูให้ใครที่ไหนฯ",
    "lo": "ເດັກນ້ອຍກຳລັງໄປໂຮງຮຽນແລະນໍ້າຖ້ວມໃຫຍ່ໆ",
    "km": "ខ្ញុំស្រឡាញ់ប្រទេសកម្ពុជាក្រុងភ្នំពេញស្ត្រី",
    "my": "မြန်မာနိုင်ငံသည်အရှေ့တောင်အာရှတွင်ရှိသောနိုင်ငံဖြစ်သည်",
    "ja": "きょうはガッコウへいったら、がっこうはやすみだったよーというはなし人々",
    "zh": "今天天气很好我们一起去公园散步吧",
    "hi": "प्रत्येकव्यक्तिकोशिक्षाकाअधिकारहै",
    "ko": "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165",
    "en": "👩‍👩‍👧‍👦🇹🇭🇹🇭👍🏽e\u0301e\u0301\u0323",
}
"""Texts without a space. In each letter some signs belong together."""

BOUND = regex.compile(
    # a consonant with all its signs, joined ones as one; its vowels before and after it in Thai
    r"[เ-ไເ-ໄ]?(?:\X(?<=[\u17d2\u1039\u094d])|\u200d)*\X"
    r"(?:[ะาำๅๆฯະາຳໆーっゃゅょッャュョ々]|[က-အ]်[\u102b-\u103e]*)*"
)


@pytest.mark.parametrize("language", WHOLE)
@pytest.mark.parametrize("knows_words", [False, True])
def test_no_letter_is_cut(
    language: str, knows_words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not knows_words:
        monkeypatch.setattr(sentences, "word_ends", lambda text: ())
    text = WHOLE[language]
    letters = BOUND.findall(text)
    assert "".join(letters) == text
    whole = {0, *accumulate(map(len, letters))}
    longest = max(map(len, letters))
    for max_chars in range(longest, 20):
        pieces = split_sentences(text, language, max_chars=max_chars)
        assert "".join(pieces) == text
        assert all(len(each) <= max_chars for each in pieces)
        assert whole.issuperset(accumulate(map(len, pieces))), pieces


def test_thai_is_cut_between_phrases_and_then_between_words() -> None:
    pytest.importorskip("pythainlp")
    text = "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย มีประชากรมากที่สุด"
    assert split_sentences(text, "th", max_chars=45) == text.split()
    assert split_sentences(text, "th", max_chars=20) == [
        "กรุงเทพมหานครเป็น",
        "เมืองหลวงของประเทศ",
        "ไทย",
        "มีประชากรมากที่สุด",
    ]
    # A word that would end beyond the limit does not seem to end there.
    assert split_sentences("คนกรุงเทพมหานคร", "en", max_chars=8) == ["คน", "กรุงเทพม", "หานคร"]


def test_a_space_without_width_ends_a_word() -> None:
    assert split_sentences("ភាសា\u200bខ្មែរ\u200bស្រួល", "km", max_chars=12) == [
        "ភាសា\u200bខ្មែរ\u200b",
        "ស្រួល",
    ]


def test_a_dictionary_is_read_for_thai_only() -> None:
    code = (
        "import sys\n"
        "from engine.media.sentences import split_sentences\n"
        "split_sentences('a' * 1000, 'en', max_chars=100)\n"
        "split_sentences('สวัสดี ครับ', 'th', max_chars=8)\n"
        "assert not any('thai' in name for name in sys.modules if 'engine' not in name)\n"
        "split_sentences('สวัสดีครับ', 'th', max_chars=8)\n"
        "assert 'pythainlp' in sys.modules\n"
    )
    pytest.importorskip("pythainlp")
    with TemporaryDirectory() as home:
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HOME": home},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert os.listdir(home) == []


def test_max_chars_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_chars"):
        split_sentences("a", "en", max_chars=0)


@given(
    st.text(
        alphabet=st.sampled_from("aA1é.,;:!?\"'()。， \n\u0301-—$เก็่า\u200b\u200d្ကម်"),
        max_size=200,
    ),
    st.integers(1, 30),
    st.sampled_from(["en", "fr", "de", "ja", "xx"]),
)
def test_nothing_is_lost_and_nothing_is_too_long(text: str, max_chars: int, language: str) -> None:
    found = split_sentences(text, language, max_chars=max_chars)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(piece == piece.strip() and 1 <= len(piece) <= max_chars for piece in found)


def test_a_million_characters_take_no_second() -> None:
    for text in (
        "The quick fox, it ran. " * 45_000,
        "a" * 1_000_000,
        "a, " * 333_333,
        "ខ្មែ" * 250_000,
    ):
        began = time.process_time()
        found = split_sentences(text, "en", max_chars=400)
        assert time.process_time() - began < 1.5
        assert len(found) >= 2_500
