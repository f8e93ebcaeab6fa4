"""What WangchanBERTa wants done to a text before its tokenizer reads it.

The model was trained on texts that its publisher's function had rewritten (process_transformers,
https://github.com/vistec-AI/thai2transformers, preprocess.py). Its tokenizer does not do that: it
would lose every space, which in Thai ends a clause. So the server does.

The last rule of that function is not here: it drops a word that follows itself, and takes a
dictionary of Thai to find words.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

SPACE = "<_>"
"""What stands for a space. Only tokenizers of this family have it."""

FILES = (
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files of a tokenizer that may name the symbol."""

_LEFT_BY_HTML = (
    ("#39;", "'"),
    ("amp;", "&"),
    ("#146;", "'"),
    ("nbsp;", " "),
    ("#36;", "$"),
    (r"\n", "\n"),
    ("quot;", "'"),
    ("<br />", "\n"),
    (r"\"", '"'),
    (" @.@ ", "."),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    ("\\", r" \ "),
)
"""What web pages left in the texts, in the order in which it is replaced."""

_BETWEEN_WORDS = re.compile("[^a-zA-Z0-9ก-๙]+")
_BRACKETS = (("(", ")"), ("{", "}"), ("[", "]"))

_REPEATED = re.compile(r"(\S)\1{3,}")
_STAND_INS = "\u0e3b\u0e3c\u0e3d\u0e3e" + "".join(map(chr, range(0xE01, 0xE3B)))
"""Characters that no rule removes: code points among the Thai letters that mean nothing, and
letters, for a text that has those."""


def as_trained(text: str, mask: str | None = None) -> str:
    """The text in the form in which the model was trained to read it.

    `mask` stays as it is, wherever it stands.
    """
    if mask is None or mask not in text:
        return _rewritten(text)
    # Two that take turns: of one, the rule about repeated letters would leave the first of four.
    first, second = [each for each in _STAND_INS if each not in text][:2]
    parts = text.split(mask)
    joined = parts[0] + "".join(
        (first if index % 2 else second) + part for index, part in enumerate(parts[1:])
    )
    return _rewritten(joined).replace(first, mask).replace(second, mask)


def _rewritten(text: str) -> str:
    text = text.lower()
    for found, instead in _LEFT_BY_HTML:
        text = text.replace(found, instead)
    text = re.sub(" {2,}", " ", html.unescape(text))
    text = _BETWEEN_WORDS.sub(_without_brackets, text)
    text = re.sub(" {2,}", " ", text.strip().replace("\n", " "))
    return _REPEATED.sub(r"\1", text.replace(" ", SPACE))


def _without_brackets(found: re.Match[str]) -> str:
    """What is between two words, without brackets that hold none.

    What stands between a bracket and its words goes, too. The publisher's patterns do the same, but
    take minutes for a text of brackets alone.
    """
    between = found.group()
    for left, right in _BRACKETS:
        between = between.replace(left + right, "")
    for left, right in _BRACKETS:
        first, last = between.find(left), between.rfind(right)
        if 0 <= first < last - 1:
            between = between[:first] + between[last + 1 :]
    if found.end() < len(found.string):
        for left, _ in _BRACKETS:
            if (first := between.find(left)) >= 0:
                between = between[: first + 1]
    if found.start() > 0:
        for _, right in _BRACKETS:
            if (last := between.rfind(right)) >= 0:
                between = between[last:]
    return between


def reads_space_symbol(folder: Path) -> bool:
    """Whether a model's tokenizer has the symbol for a space."""
    symbol = SPACE.encode()
    return any(symbol in path.read_bytes() for name in FILES if (path := folder / name).is_file())
