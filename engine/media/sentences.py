"""Text cut into sentences that are spoken one after the other."""

from __future__ import annotations

import re
import unicodedata

import regex
import sentencex

from engine.media.word_ends import THAI, word_ends

_CLAUSE_END = re.compile(r"[,;:—–](?=\s)|[、，；：၊។]")
"""Where a sentence that is too long is cut first. `1,000` and `12:30` have no space there."""

_ZERO_WIDTH_SPACE = "\u200b"
"""Marks the ends of words in Thai, Lao, Khmer and Burmese, where a text has it."""

_WITH_NEXT = re.compile("[\u0e40-\u0e44\u0ec0-\u0ec4\u200d]")
"""Vowels of Thai and Lao that stand before their consonant, and what joins emoji."""

_WITH_LAST = re.compile(
    "[\u0e2f\u0e30\u0e32\u0e33\u0e45\u0e46\u0eaf\u0eb0\u0eb2\u0eb3\u0ec6"
    "\u3005\u3041\u3043\u3045\u3047\u3049\u3063\u3083\u3085\u3087\u308e\u3099-\u309e"
    "\u30a1\u30a3\u30a5\u30a7\u30a9\u30c3\u30e3\u30e5\u30e7\u30ee\u30f5\u30f6\u30fc-\u30fe]"
    "|[\u1000-\u1021]\u103a"
)
"""What belongs to the letter before it: vowels and signs of Thai and Lao, small kana, marks of
length and repetition, and a Burmese consonant without a vowel."""

_VIRAMA, _ASAT = 9, "\u103a"
"""The combining class of signs that join two consonants, as in Khmer and Burmese, and the sign of
that class that does not: it ends a syllable."""

_CLUSTER = regex.compile(r"\X")
"""What Unicode calls a grapheme cluster: a letter with all that stands above and below it."""

_LONGEST_WORD = 40
"""Letters beyond the place of a cut that are looked at, so that no word seems to end there."""

_OPEN_END = r"(?:^\W*\d{1,3}|\b(?:e\.g|i\.e|cf)|(?<![\w.])[^\W\d_a-z])\.\s*$"
"""What the library mistakes for an end: `1.` of a list, `e.g.`, an initial."""

_OPEN_ENDS = {
    "": re.compile(_OPEN_END),
    "de": re.compile(_OPEN_END + r"|\b\d{1,2}\.\s*$"),  # am 3. Mai
    "fr": re.compile(_OPEN_END + r"|\b(?:MM|Mme|Mlle|Mgr)\.\s*$"),
    # พ.ศ., มี.ค., ดร.: an abbreviation has consonants. A Thai sentence hardly ever has a full stop.
    "th": re.compile(_OPEN_END + r"|(?<![ก-๙])[เ-ไ]?[ก-ฮ][ิี]?[ก-ฮ]{0,3}\.\s*$"),
}


def split_sentences(text: str, language: str, *, max_chars: int) -> list[str]:
    """The sentences of a text in order, each of at most `max_chars` characters.

    `language` is ISO 639-1 with or without a region; `en-gb` counts as `en`. It decides which
    abbreviations do not end a sentence. White space becomes single spaces. A line break alone does
    not end a sentence, but an empty line does.

    A sentence that is too long is cut after the last comma or similar mark that fits. Without one
    it is cut at the last space, which in Thai ends a phrase, otherwise after the last word as far
    as words are known (`word_ends`), otherwise between two letters. A letter keeps its vowels and
    accents, unless these alone are too long. Together the sentences have every character of the
    text but white space. A piece without letter or digit joins the sentence before it, if there is
    one in its paragraph.

    Raises:
        ValueError: `max_chars` is below 1.

    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be 1 or more, not {max_chars}")
    primary = language.replace("_", "-").partition("-")[0].lower()
    primary = "th" if primary == "tha" else primary  # as models of many languages name it
    open_end = _OPEN_ENDS.get(primary, _OPEN_ENDS[""])
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences: list[str] = []
        for found in sentencex.segment(primary, " ".join(paragraph.split())):
            goes_on = sentences and (open_end.search(sentences[-1]) or not _speaks(found))
            if goes_on:
                sentences[-1] += found
            else:
                sentences.append(found)
        for sentence in sentences:
            pieces += _cut(sentence.strip(), max_chars)
    return pieces


def _speaks(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _cut(sentence: str, max_chars: int) -> list[str]:
    pieces = []
    while len(sentence) > max_chars:
        end = _end_of_piece(sentence, max_chars)
        pieces.append(sentence[:end].rstrip())
        sentence = sentence[end:].lstrip()
    if sentence:
        pieces.append(sentence)
    return pieces


def _end_of_piece(sentence: str, max_chars: int) -> int:
    """Where to cut: at most `max_chars`, at least 1."""
    clauses = [match.end() for match in _CLAUSE_END.finditer(sentence, 0, max_chars + 1)]
    fitting = [end for end in clauses if end <= max_chars]
    if fitting:
        return fitting[-1]
    space = sentence.rfind(" ", 0, max_chars + 1)
    if space > 0:
        return space
    return _end_of_word(sentence, max_chars) or _end_of_letter(sentence, max_chars) or max_chars


def _end_of_word(sentence: str, max_chars: int) -> int:
    """Where the last word ends that fits; 0 if that is not known."""
    marked = sentence.rfind(_ZERO_WIDTH_SPACE, 1, max_chars)
    if marked > 0:
        return marked + 1
    if not (THAI.match(sentence[max_chars - 1]) and THAI.match(sentence[max_chars])):
        return 0
    ends = word_ends(sentence[: max_chars + _LONGEST_WORD])
    fitting = (end for end in reversed(ends) if end <= max_chars)
    return next((end for end in fitting if _may_part(sentence, end)), 0)


def _end_of_letter(sentence: str, max_chars: int) -> int:
    """The last place between two letters that fits; 0 if there is none."""
    ends = [cluster.end() for cluster in _CLUSTER.finditer(sentence, 0, max_chars + _LONGEST_WORD)]
    fitting = (end for end in reversed(ends) if end <= max_chars)
    return next((end for end in fitting if _may_part(sentence, end)), 0)


def _may_part(sentence: str, end: int) -> bool:
    """Whether a cut leaves each letter whole. Unicode's clusters leave out some of Asia's rules."""
    return not (
        (unicodedata.combining(sentence[end - 1]) == _VIRAMA and sentence[end - 1] != _ASAT)
        or unicodedata.category(sentence[end]) in ("Mn", "Mc", "Me")
        or _WITH_NEXT.match(sentence, end - 1)
        or _WITH_LAST.match(sentence, end)
    )
