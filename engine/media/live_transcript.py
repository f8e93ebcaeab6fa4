"""The part of a growing transcript that will not change, while the words are still spoken.

LocalAgreement-2 (Macháček, Dabre, Bojar 2023, "Turning Whisper into Real-Time Transcription
System"): the audio so far is transcribed again and again. What two hypotheses in succession agree
on, from the beginning, is said; the rest may still change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters: no spaces between words."""

_WORD = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")


def split_words(text: str) -> list[str]:
    """The words of a text, each with the white space before it; joined they are the text.

    Where a script has no spaces, each character counts as a word. White space at the end is lost.
    """
    return _WORD.findall(text)


class LiveTranscript:
    """The transcript of one turn, as deltas that are never taken back."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._last: list[str] = []

    @property
    def text(self) -> str:
        """All deltas so far."""
        return "".join(self._said)

    def hypothesis(self, words: Sequence[str]) -> str:
        """The text that these words and those of the call before agree on, and that is not said.

        The words are those of the whole turn so far. Each has the white space before it, as from
        `split_words` and from faster-whisper; words without any are joined with spaces. Two agree
        if they are equal to the letter, case and marks included: the final text is then likely the
        same. Nothing is said while the words contradict what is said already. There a comma
        or a capital is not a contradiction.
        """
        new = _spaced(words)
        last, self._last = self._last, new
        count = len(self._said)
        if not all(map(_same, self._said, new)):
            self._last = []  # its places do not correspond
            return ""
        rest = zip(new[count:], last[count:], strict=False)
        agreed = [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], rest)]
        self._said += agreed
        return "".join(agreed)

    def final(self, text: str) -> str:
        """What is still to be said of the final transcript.

        Nothing if it does not begin with what was said. Then only the whole transcript, which the
        client receives with the end of the turn, corrects it.
        """
        text, said = text.strip(), self.text
        return text[len(said) :] if text.startswith(said) else ""


def _spaced(words: Sequence[str]) -> list[str]:
    """The words with the space before each, and none before the first."""
    if not any(word[:1].isspace() for word in words):
        words = split_words(" ".join(words)) if not _is_unspaced(words) else words
    spaced = [word for word in words if word.strip()]
    return [spaced[0].lstrip(), *spaced[1:]] if spaced else []


def _is_unspaced(words: Sequence[str]) -> bool:
    return re.search(f"[{_UNSPACED}]", "".join(words)) is not None


def _same(one: str, other: str) -> bool:
    """Whether two words differ in case and marks at most."""
    return _letters(one) == _letters(other)


def _letters(word: str) -> str:
    return "".join(filter(str.isalnum, word.casefold()))
