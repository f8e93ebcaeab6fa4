"""Text cut into sentences that are spoken one after the other."""

from __future__ import annotations

import re
import unicodedata

import sentencex

_CLAUSE_END = re.compile(r"[,;:—–](?=\s)|[、，；：]")
"""Where a sentence that is too long is cut first. `1,000` and `12:30` have no space there."""

_OPEN_END = r"(?:^\W*\d{1,3}|\b(?:e\.g|i\.e|cf)|(?<![\w.])[^\W\d_a-z])\.\s*$"
"""What the library mistakes for an end: `1.` of a list, `e.g.`, an initial."""

_OPEN_ENDS = {
    "": re.compile(_OPEN_END),
    "de": re.compile(_OPEN_END + r"|\b\d{1,2}\.\s*$"),  # am 3. Mai
    "fr": re.compile(_OPEN_END + r"|\b(?:MM|Mme|Mlle|Mgr)\.\s*$"),
}


def split_sentences(text: str, language: str, *, max_chars: int) -> list[str]:
    """The sentences of a text in order, each of at most `max_chars` characters.

    `language` is ISO 639-1 with or without a region; `en-gb` counts as `en`. It decides which
    abbreviations do not end a sentence. White space becomes single spaces. A line break alone does
    not end a sentence, but an empty line does.

    A sentence that is too long is cut after the last comma or similar mark that fits. Without one
    it is cut at the last space, otherwise anywhere. Together the sentences have every character of
    the text but white space. A piece without letter or digit joins the sentence before it, if
    there is one in its paragraph.

    Raises:
        ValueError: `max_chars` is below 1.

    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be 1 or more, not {max_chars}")
    primary = language.replace("_", "-").partition("-")[0].lower()
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
    end = max_chars
    while end > 1 and unicodedata.combining(sentence[end]):
        end -= 1  # an accent stays with its letter
    return end
