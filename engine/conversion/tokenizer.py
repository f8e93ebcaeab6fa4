"""The tokenizer of a GGUF file, as one of Hugging Face.

transformers builds one too, but without the pre-tokenizer of some vocabularies (SmolLM, DeepSeek,
StarCoder), without `ignore_merges`, and without what the file says of BOS and prefix spaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.conversion.header import GgufHeader
from engine.conversion.refusals import TAKE_THE_ORIGINAL
from engine.conversion.splits import (
    BEGIN_WITH_BOS,
    COMPOSED,
    SPLITS,
    WHOLE_WORDS,
    pre_tokenizer,
)
from engine.errors import LoadFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BYTE_PAIRS, SENTENCE_PIECES = "gpt2", "llama"
"""The kinds of vocabulary that are converted, by the key model of the tokenizer."""

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that the text names whole: those that decoding drops, and those that it keeps."""

END_OF_ANSWER = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
        "<|end_of_text|>", "<EOT>", "[EOT]", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip
"""Control tokens that end an answer, besides the file's own EOS. llama.cpp stops at them too."""

_SPACE = "▁"
_KEEP_WHAT_FOLLOWS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def check_tokenizer(header: GgufHeader) -> None:
    """Refuse a vocabulary that would split texts in another way than the original.

    Raises:
        LoadFailed: with the name of what is not known.

    """
    name, kind = header.file.name, header.of_tokenizer("model")
    if kind not in (BYTE_PAIRS, SENTENCE_PIECES):
        raise LoadFailed(
            f"{name} has a tokenizer of the kind {kind!r}, which is not converted;"
            f" {TAKE_THE_ORIGINAL}"
        )
    tokens = header.of_tokenizer("tokens") or []
    if not tokens:
        raise LoadFailed(f"{name} has no vocabulary (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise LoadFailed(f"{name} is damaged: its vocabulary has a token twice")
    types = header.of_tokenizer("token_type")
    if types is not None and len(types) != len(tokens):
        raise LoadFailed(f"{name} is damaged: it has {len(tokens)} tokens of {len(types)} types")
    needed = "merges" if kind == BYTE_PAIRS else "scores"
    if not header.of_tokenizer(needed):
        raise LoadFailed(f"{name} has no {needed} for its vocabulary (tokenizer.ggml.{needed})")
    for role in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        index = header.of_tokenizer(f"{role}_token_id")
        if index is not None and index >= len(tokens):
            raise LoadFailed(f"{name} is damaged: its {role} token is not in the vocabulary")
    if kind != BYTE_PAIRS:
        return
    pre = header.of_tokenizer("pre")
    if not pre or pre == "default":
        raise LoadFailed(
            f"{name} does not say how its vocabulary splits a text (tokenizer.ggml.pre): an old"
            f" llama.cpp made it. Take a newer file, or {TAKE_THE_ORIGINAL}"
        )
    if pre not in SPLITS:
        raise LoadFailed(
            f"{name} splits a text by {pre!r} (tokenizer.ggml.pre), which is not converted;"
            f" {TAKE_THE_ORIGINAL}"
        )


def build_tokenizer(header: GgufHeader) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and its chat template, if the file has one."""
    from transformers import PreTrainedTokenizerFast

    check_tokenizer(header)
    is_pieces = header.of_tokenizer("model") == SENTENCE_PIECES
    backend = _sentence_pieces(header) if is_pieces else _byte_pairs(header)
    _add_whole_tokens(backend, header, strip_right=is_pieces and header.architecture == "phi3")
    named: dict[str, Any] = {
        f"{role}_token": token
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := _token(header, key)) is not None
    }
    if (template := header.metadata.get("tokenizer.chat_template")) is not None:
        named["chat_template"] = template
    begins = is_pieces or header.of_tokenizer("pre") in BEGIN_WITH_BOS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # None and not left out: the class has tokens of its own by default.
        **dict.fromkeys(("bos_token", "eos_token")) | named,
        add_bos_token=bool(header.of_tokenizer("add_bos_token", begins)) and "bos_token" in named,
        add_eos_token=bool(header.of_tokenizer("add_eos_token", False)) and "eos_token" in named,
        model_max_length=int(header.of_model("context_length")),
        clean_up_tokenization_spaces=False,
    )


def ends_of_answer(header: GgufHeader) -> list[int]:
    """The tokens that end an answer, the file's own EOS first."""
    tokens = header.of_tokenizer("tokens")
    types = header.of_tokenizer("token_type") or [CONTROL] * len(tokens)
    named = [header.of_tokenizer(f"{role}_token_id") for role in ("eos", "eot", "eom")]
    marked = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL and token in END_OF_ANSWER
    ]
    return list(dict.fromkeys(index for index in (*named, *marked) if index is not None))


def _token(header: GgufHeader, role: str) -> str | None:
    index = header.of_tokenizer(f"{role}_token_id")
    return None if index is None else str(header.of_tokenizer("tokens")[index])


def _byte_pairs(header: GgufHeader) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pre = header.of_tokenizer("pre")
    vocabulary = {token: index for index, token in enumerate(header.of_tokenizer("tokens"))}
    merges = [_pair(merge) for merge in header.of_tokenizer("merges")]
    backend: Tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    # From the second character: the first token may be a space.
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _sentence_pieces(header: GgufHeader) -> Tokenizer:
    from tokenizers import decoders, normalizers
    from transformers.integrations.gguf import convert_gguf_tokenizer

    wanted = ("tokens", "scores", "token_type", "merges")
    described = {key: header.of_tokenizer(key) for key in wanted}
    found = {key: value for key, value in described.items() if value is not None}
    backend: Tokenizer = convert_gguf_tokenizer(
        header.architecture, {"tokenizer_type": SENTENCE_PIECES, **found}
    )[0]
    if header.architecture.startswith("gemma"):
        return backend  # no space before the text, whatever the file says
    # A space goes before the text and after each special token, as llama.cpp does.
    prefix = bool(header.of_tokenizer("add_space_prefix", True))
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _add_whole_tokens(backend: Tokenizer, header: GgufHeader, *, strip_right: bool) -> None:
    """Tokens that are found whole in a text. Phi 3's take the line's end that follows them."""
    from tokenizers import AddedToken

    vocabulary = backend.get_vocab()
    for token, kind in zip(
        header.of_tokenizer("tokens"), header.of_tokenizer("token_type") or (), strict=False
    ):
        if kind not in (CONTROL, USER_DEFINED) or token not in vocabulary:
            continue
        special = kind == CONTROL
        strips = strip_right and special and token not in _KEEP_WHAT_FOLLOWS
        added = AddedToken(token, normalized=False, special=special, rstrip=strips)
        if special:
            backend.add_special_tokens([added])
        else:
            backend.add_tokens([added])
