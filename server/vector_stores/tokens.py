"""Where the tokens of a text are, by the embedding model's own tokenizer or by an approximation."""

from __future__ import annotations

import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, ModelConfig
from engine.model_folder import present_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

SPECIAL_TOKENS = 2
"""What models put round a text, such as [CLS] and [SEP]."""

_PIECE_CHARS = 100_000
"""A tokenizer gets so much text at once."""

_APPROXIMATE = re.compile(r"[0-9A-Za-z_\u00c0-\u024f]{1,4}|[^\s0-9A-Za-z_\u00c0-\u024f]")
"""Up to four letters of Latin script, or one other character. Most tokenizers need fewer."""

_PROMPTS = "config_sentence_transformers.json"


@dataclass(frozen=True, slots=True)
class Spans:
    """The characters of each token: its first, and the one after its last.

    Arrays, as a text may have ten million tokens.
    """

    begins: array[int] = field(default_factory=lambda: array("i"))
    ends: array[int] = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.begins)

    def add(self, begin: int, end: int) -> None:
        """Add the next token."""
        self.begins.append(begin)
        self.ends.append(end)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is known of the tokens of an embedding model."""

    tokenizer: Tokenizer | None
    """None: nobody has it, so that counts are approximate."""
    max_tokens: int | None
    """Of a passage; None: nobody knows."""
    has_prompts: bool
    """Whether the model wants other texts before queries than before passages."""

    def spans(self, text: str) -> Spans:
        """The tokens of a text, in order. It blocks, for long texts for seconds."""
        found = Spans()
        for start, piece in _pieces(text):
            if self.tokenizer is None:
                for match in _APPROXIMATE.finditer(piece):
                    found.add(start + match.start(), start + match.end())
                continue
            for begin, end in self.tokenizer.encode(piece, add_special_tokens=False).offsets:
                if end > begin:
                    found.add(start + begin, start + end)
        return found


def tokens_of(model: ModelConfig, config: EngineConfig) -> Tokens:
    """The tokens of a model whose files are here. It blocks on the disk."""
    if model.runtime == "remote":
        return Tokens(None, None, has_prompts=False)
    folder = present_folder(model.source, config.cache_dir)
    if folder is None:
        most = _option(model, "max_model_len")
        return Tokens(None, most and max(1, most - SPECIAL_TOKENS), has_prompts=False)
    prompts = model.options.get("prompts") or _read(folder / _PROMPTS).get("prompts") or {}
    tokenizer = _tokenizer(folder)
    most = _option(model, "max_model_len") or _context(folder)
    if most is not None:
        texts = [str(text) for text in prompts.values()]
        before = max((len(text) for text in texts), default=0)
        if tokenizer is not None and texts:
            before = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        most = max(1, most - SPECIAL_TOKENS - before)
    return Tokens(tokenizer, most, has_prompts=any(prompts.values()))


def _tokenizer(folder: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        log.warning("%s cannot be read, so tokens are approximate: %s", path, error)
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _context(folder: Path) -> int | None:
    """The longest input, of sentence-transformers' file or of the model's own."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("config.json", "max_position_embeddings"),
    ):
        value = _read(folder / name).get(key)
        if isinstance(value, int) and value > SPECIAL_TOKENS:
            return value
    return None


def _option(model: ModelConfig, name: str) -> int | None:
    value = model.options.get(name)
    return value if isinstance(value, int) else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """The text in pieces that end at a space, each with the place where it begins."""
    begin = 0
    while begin < len(text):
        end = min(len(text), begin + _PIECE_CHARS)
        if end < len(text):
            space = max(text.rfind(mark, begin + 1, end) for mark in ("\n", " "))
            if space > begin:
                end = space
        yield begin, text[begin:end]
        begin = end
