"""Parts of speech for English by rules, for use without a trained tagger.

misaki looks up words by their Penn Treebank tag. The tag matters for words with two pronunciations
(`the use`, `to use`), for currency, for punctuation and for weak forms. The tags here decide these
cases. Where tags make no difference to misaki, one stands for all: every noun is `NN`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = {
    "DT": "a an the this these those every each no some any another both either neither",
    "IN": "of in on at by for with from into onto about as than if because while although though"
    " since until unless whether before after during between among against without within"
    " under over above below near through across behind beyond despite per via like that vs vs.",
    "TO": "to",
    "PRP": "i you he she it we they me him us them myself yourself himself herself itself"
    " ourselves themselves",
    "PRP$": "my your his her its our their",
    "MD": "can could will would shall should may might must can't couldn't won't wouldn't shouldn't"
    " 'll 'd ca wo",
    "CC": "and or but nor yet so",
    "WP": "who whom what which whose",
    "WRB": "when where why how",
    "RB": "not n't never always often also very too quite just only still already even soon now"
    " then here there again",
    "VBP": "am are have do 're 've 'm",
    "VBZ": "is has does 's",
    "VBD": "was were had did",
    "VBN": "been",
    "VB": "be",
    "VBG": "being having doing",
    "JJ": "many few several more most other such same new old good bad great little big small long"
    " high low own early young large next last",
    "CD": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    " fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty"
    " ninety hundred thousand million billion trillion",
}
_CLOSED = {word: tag for tag, words in _WORDS.items() for word in words.split()}
"""Words whose part of speech hardly ever depends on their place."""

_BE = frozenset(("be", "is", "are", "am", "was", "were", "been", "being", "'s", "'re", "'m"))
_HAVE = frozenset(("have", "has", "had", "having", "'ve"))
_DO = frozenset(("do", "does", "did"))
_SUBJECTS = frozenset(("i", "you", "we", "they", "he", "she", "it", "who"))

_MARKS = {
    **dict.fromkeys(".!?", "."),
    ",": ",",
    **dict.fromkeys((";", ":", "…", "...", "—", "–", "--"), ":"),
    **dict.fromkeys("([{", "-LRB-"),
    **dict.fromkeys(")]}", "-RRB-"),
    **dict.fromkeys("$£€", "$"),
    "“": "``",
    "”": "''",
    **dict.fromkeys("*_~|<>^#", "NFP"),
}
_ADDRESS = re.compile(r"^(?:\w+://\S+|www\.\S+|\S+@\S+\.\w+|(?:[\w-]+\.)+[a-z]{2,}(?:/\S*)?)$")


def tag_english(words: Sequence[str], spaces: Sequence[bool]) -> list[str]:
    """The Penn Treebank tag of each token. `spaces` says which have white space after them."""
    tags: list[str] = []
    quoted = False
    shouted = not any(any(map(str.islower, word)) for word in words)
    for index, word in enumerate(words):
        if word == '"':
            tags.append("''" if quoted else "``")
            quoted = not quoted
        elif word == "-":
            # Spoken as a pause, but not within a word.
            within = 0 < index < len(words) - 1 and not spaces[index] and not spaces[index - 1]
            tags.append("HYPH" if within else ":")
        elif word in _MARKS:
            tags.append(_MARKS[word])
        elif word[:1].isdigit() or (word[:1] in ".-" and word[1:2].isdigit()):
            tags.append("CD")
        elif _ADDRESS.match(word):
            tags.append("ADD")
        elif len(word) > 1 and word.isupper() and not shouted:
            tags.append("NNP")  # US, not us
        else:
            following = words[index + 1].lower() if index + 1 < len(words) else ""
            tags.append(_tag_word(word, words[:index], tags, following))
    return tags


def _tag_word(word: str, before: Sequence[str], tags: Sequence[str], following: str) -> str:
    lower = word.lower()
    if lower in _CLOSED:
        return _CLOSED[lower]
    if word[:1].isupper() and tags and tags[-1] not in ("``", ":", "."):
        return "NNP"
    # "has never used" and "do not use" count as "has used" and "do use".
    back = len(tags)
    while back and tags[back - 1] == "RB":
        back -= 1
    previous = before[back - 1].lower() if back else ""
    tag = tags[back - 1] if back else ""
    if lower.endswith("ly"):
        return "RB"
    if lower.endswith("ing"):
        return "VBG"
    if previous in _HAVE:
        return "NN" if _CLOSED.get(following) == "IN" and lower.endswith("s") else "VBN"
    if previous in _BE:
        return "VBN" if lower.endswith("ed") or following == "by" else "JJ"
    if tag in ("TO", "MD") or previous in _DO:
        return "VB"
    if lower.endswith("ed"):
        return "VBD"
    if previous in _SUBJECTS:
        return "VBZ" if lower.endswith("s") else "VBP"
    if tag in ("DT", "PRP$", "JJ", "CD", "IN"):
        return "NN"
    if _CLOSED.get(following) in ("DT", "PRP", "PRP$"):
        return "VB"
    return "NN"
