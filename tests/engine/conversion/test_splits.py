"""How a text is split before its merges, against the pieces of the original tokenizers."""

from __future__ import annotations

import pytest

from engine.conversion.splits import pre_tokenizer

TEXT = "I'm IT'S  2026x\n\n  你好，世界 ABCdefG!?\r\n\t'll3/\n"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "I|'m| IT|'|S| | 2026|x|\n\n | 你好|，|世界| ABCdefG|!?|\r\n|\t|'ll|3|/|\n"),
        ("smollm", "I|'m| IT|'|S|  |2|0|2|6|x|\n\n | 你好|，|世界| ABCdefG|!?|\r\n|\t|'ll|3|/|\n"),
        ("llama-bpe", "I|'m| IT|'S| | |202|6|x|\n\n| | 你好|，世界| ABCdefG|!?\r\n|\t|'ll|3|/\n"),
        ("qwen2", "I|'m| IT|'S| | |2|0|2|6|x|\n\n| | 你好|，世界| ABCdefG|!?\r\n|\t|'ll|3|/\n"),
        ("tekken", "I|'m| IT|'S| | |2|0|2|6|x|\n\n| | 你好|，世界| ABCdef|G|!?\r\n|\t|'ll|3|/\n"),
        ("gpt-4o", "I'm| IT'S| | |202|6|x|\n\n| | 你好|，世界| ABCdef|G|!?\r\n|\t|'ll|3|/\n"),
        (
            "deepseek-coder",
            "I|'|m| IT|'|S|  |2|0|2|6|x|\n|\n| | |你好|，|世界| ABCdefG|!?|\r|\n|\t'|ll|3|/|\n",
        ),
        (
            "deepseek-v3",
            "I|'m| IT|'S|  |202|6|x|\n\n|  |你好|，|世界| ABCdefG|!?\r\n|\t|'ll|3|/\n",
        ),
    ],
)
def test_pieces(name: str, pieces: str) -> None:
    found = pre_tokenizer(name).pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in found] == pieces.split("|")
