"""How each vocabulary splits a text before its merges, by `tokenizer.ggml.pre` of a GGUF file.

The names and expressions are those of llama.cpp (src/llama-vocab.cpp) and of the `tokenizer.json`
of the original models. Each expression splits what the one before it left.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_JAPANESE_AND_CHINESE = "[一-龥぀-ゟ゠-ヿ]+"

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
DIGITS = (r"\p{N}", *GPT2)
LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
)
QWEN2 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _JAPANESE_AND_CHINESE,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
)
SEED_CODER = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,
)

SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: expressions
        for names, expressions in (
            (
                "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion"
                " granite-docling",
                GPT2,
            ),
            ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", DIGITS),
            (
                "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe"
                " glm4 chatglm-bpe minicpm5",
                LLAMA3,
            ),
            (
                "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2",
                QWEN2,
            ),
            ("tekken", TEKKEN),
            ("gpt-4o llama4 kanana2 talkie minimax-m2", GPT4O),
            ("deepseek-coder", DEEPSEEK_CODER),
            ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", DEEPSEEK_V3),
            ("seed-coder", SEED_CODER),
        )
        for name in names.split()
    }
)
"""The expressions by name."""

WHOLE_WORDS = frozenset(
    [
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "minicpm5",
        "tekken",
    ]
)
"""A piece that is a token is not merged from its parts (`ignore_merges`)."""

BEGIN_WITH_BOS = WHOLE_WORDS - {"minicpm5"}
"""A text begins with BOS where the file does not say (`add_bos_token`)."""

COMPOSED = frozenset({"qwen2"})
"""The text is normalised to NFC first, as the original tokenizer does."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """What splits a text into the pieces that are merged each on its own."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])
