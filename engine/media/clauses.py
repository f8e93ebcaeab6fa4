"""Text that arrives in pieces, cut into clauses that can be spoken already."""

from __future__ import annotations

import re

FIRST_CHARS = 12
"""The first clause is short, as somebody waits for it. Below this it would sound broken off."""
CLAUSE_CHARS = 60
"""Later clauses are whole sentences, unless they are longer than this: then clauses of them."""
FIRST_MOST_CHARS = 80
"""A first clause without any mark is cut at a space there: some five seconds of speech."""
MOST_CHARS = 240
"""So is a later one."""

_SENTENCE_END = re.compile(r"[.!?…]+[\"')\]]*(?=\s)|[。！？]|\n")
_CLAUSE_END = re.compile(r"[,;:—–](?=\s)|[、，；：]")
_NO_END = re.compile(
    r"(?:^\W*\d{1,3}|\b(?:e\.g|i\.e|cf|Mr|Mrs|Ms|Dr|St|vs)|(?<![\w.])[^\W\d_a-z])\.$"
)
"""What is no end: `1.` of a list, `e.g.`, a title, an initial."""


class Clauses:
    """Cuts a text while it is written. The pieces together are the text."""

    def __init__(self, *, whole_sentences: bool = False) -> None:
        """`whole_sentences` are not cut, unless they are too long without any mark."""
        self._whole_sentences = whole_sentences
        self._text = ""
        self._begun = False

    def feed(self, text: str) -> list[str]:
        """The clauses that this text completes."""
        self._text += text
        found = []
        while (end := self._end()) is not None:
            clause, self._text = self._text[:end], self._text[end:]
            if clause.strip():
                found.append(clause)
                self._begun = True
        return found

    def finish(self) -> list[str]:
        """What is left."""
        rest, self._text = self._text, ""
        return [rest] if rest.strip() else []

    def _end(self) -> int | None:
        for match in _SENTENCE_END.finditer(self._text):
            if not _NO_END.search(self._text[: match.end()]) or match.group() == "\n":
                return match.end()
        least = CLAUSE_CHARS if self._begun else FIRST_CHARS
        for match in () if self._whole_sentences else _CLAUSE_END.finditer(self._text):
            if match.end() >= least:
                return match.end()
        most = MOST_CHARS if self._begun or self._whole_sentences else FIRST_MOST_CHARS
        if len(self._text) > most:
            space = self._text.rfind(" ", 0, most)
            return space + 1 if space > 0 else most
        return None
