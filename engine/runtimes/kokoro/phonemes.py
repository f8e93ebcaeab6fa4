"""Sentences as the phonemes that Kokoro speaks.

English uses misaki's lexicon, and espeak for words that the lexicon lacks. Its parts of speech
come from spaCy's `en_core_web_sm` if that is installed, otherwise from the rules of
`engine.runtimes.kokoro.tagger`. Other languages use espeak alone. Nothing here uses the network.

Importing this module imports torch, spaCy and kokoro.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import spacy
from misaki import en, espeak

from engine.runtimes.kokoro.tagger import tag_english
from kokoro import KPipeline

MAX_PHONEMES = 510
"""Limit of one chunk: Kokoro's context of 512, less the marks of beginning and end."""

TAGGER_PACKAGE = "en_core_web_sm"

ESPEAK_LANGUAGES = ("es", "fr-fr", "hi", "it", "pt-br")

_LONG_NUMBER = re.compile(r"\d{19,}")
"""Spoken digit by digit: quintillions are not said, and `num2words` fails beyond 306 digits."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The phonemes that the model speaks in one call."""

    phonemes: str
    """At most `MAX_PHONEMES`."""
    tokens: tuple[Any, ...] = ()
    """misaki's tokens, whose times `KPipeline.join_timestamps` finds. Only English has any."""


class Phonemizer:
    """Turns sentences of any language of Kokoro into chunks. Any thread may call it."""

    def __init__(self) -> None:
        """Read the lexicons (about a second)."""
        # Neither espeak nor spaCy's pipelines may be used by several threads at once.
        self._lock = threading.Lock()
        nlp = _tagger()
        self._english = {
            "en-us": _English(nlp, british=False),
            "en-gb": _English(nlp, british=True),
        }
        self._others = {name: espeak.EspeakG2P(language=name) for name in ESPEAK_LANGUAGES}

    def chunks(self, sentence: str, language: str) -> Iterator[Chunk]:
        """The phonemes of a sentence; none if it has nothing to speak.

        Raises:
            KeyError: Kokoro does not have this language.

        """
        sentence = _LONG_NUMBER.sub(lambda match: " ".join(match.group()), sentence)
        with self._lock:
            if language in self._english:
                _, tokens = self._english[language](sentence)
                found = KPipeline.en_tokenize(None, tokens)
                chunks = [Chunk(phonemes, tuple(parts)) for _, phonemes, parts in found]
            else:
                chunks = [Chunk(self._others[language](sentence)[0])]
        if all(len(chunk.phonemes) <= MAX_PHONEMES for chunk in chunks):
            yield from (chunk for chunk in chunks if chunk.phonemes)
            return
        # The library would silently cut off the rest.
        for half in _halves(sentence):
            yield from self.chunks(half, language)


class _English(en.G2P):  # type: ignore[misc]
    """misaki's English, without the constructor that downloads a tagger."""

    def __init__(self, nlp: Callable[[str], Any], *, british: bool) -> None:
        self.version = None
        self.british = british
        self.unk = ""  # as in KPipeline: what cannot be pronounced is left out
        self.lexicon = _Lexicon(british=british)
        self.fallback = _Fallback(british=british)
        self.nlp = nlp


def _tagger() -> Callable[[str], Any]:
    """What splits English into tokens with tags."""
    if spacy.util.is_package(TAGGER_PACKAGE):
        tagger: Callable[[str], Any] = spacy.load(TAGGER_PACKAGE, enable=["tok2vec", "tagger"])
        return tagger
    blank = spacy.blank("en")

    def tagged(text: str) -> Any:
        document = blank(text)
        words = [token.text for token in document]
        spaces = [bool(token.whitespace_) for token in document]
        for token, tag in zip(document, tag_english(words, spaces), strict=True):
            token.tag_ = tag
        return document

    return tagged


class _Lexicon(en.Lexicon):  # type: ignore[misc]
    """misaki's lexicon, without a check of every letter of its own files (0.6 s)."""

    def __init__(self, *, british: bool) -> None:
        self.british = british
        self.cap_stresses = (0.5, 2)
        accent = "gb" if british else "us"
        self.golds = self._read(f"{accent}_gold.json")
        self.silvers = self._read(f"{accent}_silver.json")

    def _read(self, name: str) -> dict[str, Any]:
        text = resources.files(en.data).joinpath(name).read_text(encoding="utf-8")
        words: dict[str, Any] = self.grow_dictionary(json.loads(text))
        return words


class _Fallback(espeak.EspeakFallback):  # type: ignore[misc]
    """misaki's espeak for words that the lexicon lacks, without marks of another language.

    espeak speaks some words as another language's, and writes `(ko)` before them and `(en-us)`
    after. The library's own would have Kokoro speak these marks.
    """

    def __init__(self, *, british: bool) -> None:
        self.british = british
        self.version = None
        self.backend = espeak.phonemizer.backend.EspeakBackend(
            language=f"en-{'gb' if british else 'us'}",
            preserve_punctuation=True,
            with_stress=True,
            tie="^",
            language_switch="remove-flags",
        )


def _halves(sentence: str) -> tuple[str, str]:
    """The sentence in two, cut at the space nearest to its middle if there is one."""
    middle = len(sentence) // 2
    left, right = sentence.rfind(" ", 1, middle + 1), sentence.find(" ", middle)
    near = min((at for at in (left, right) if at > 0), key=lambda at: abs(at - middle), default=0)
    cut = near or middle
    return sentence[:cut].strip(), sentence[cut:].strip()
