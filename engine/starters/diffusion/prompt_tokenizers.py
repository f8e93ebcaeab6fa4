"""The tokenizers of the diffusion starters: CLIP's, T5's and Llama's kinds, learned from captions.

Importing this module imports transformers and diffusers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import sentencepiece
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import T5TokenizerFast

from engine.starters.json_text import write_json

_CAPTIONS = """
a photo of a cat sitting on a red chair in the morning sun, highly detailed, sharp focus
a painting of an old steam locomotive on the turntable of a roundhouse, oil on canvas
portrait of a young woman with green eyes, soft light, film grain, 85mm
a small robot that learns to paint a picture of the sea, digital art, trending, 4k
two dogs running over a field of yellow flowers under a blue sky with white clouds
the night sky above a city with tall buildings, neon lights, rain, cinematic, wide shot
a bowl of fresh fruit on a wooden table next to a window, still life, watercolor
an astronaut riding a horse on the moon, black and white photograph, 35mm
aerial view of a river through a dark forest in autumn, drone video, slow motion
waves breaking on the beach at sunset, the camera moves from left to right, loop
low quality, blurry, bad anatomy, watermark, text, worst quality, deformed, ugly
"""
"""The text from which the tokenizers of prompts are learned."""


@dataclass(frozen=True, slots=True)
class ClipVocabulary:
    """The tokens of a CLIP tokenizer, and the pairs it merges, the earlier ones first."""

    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]


_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""How CLIP cuts a prompt before it looks for tokens; from `simple_tokenizer.py` of openai/CLIP."""

_CLIP_BOS = "<|startoftext|>"
CLIP_EOS = "<|endoftext|>"
"""The token that ends a text, and by default pads it."""

_CLIP_POSITIONS = 77


@cache
def clip_vocabulary() -> ClipVocabulary:
    """CLIP's order: the bytes, the bytes that end a word, one token a merge, the two specials.

    The end of a text is the highest id: so the encoder finds it.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    trainer = BpeTrainer(
        vocab_size=4 * len(letters),
        initial_alphabet=letters,
        # Ids decide between merges of the same frequency. Endings not named here would get
        # theirs in the random order of a hash table.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CAPTIONS], trainer)
    merges = tuple(
        (left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]
    )
    merged = (left + right for left, right in merges)
    tokens = [*letters, *endings, *merged, _CLIP_BOS, CLIP_EOS]
    return ClipVocabulary(
        MappingProxyType({token: index for index, token in enumerate(tokens)}), merges
    )


def write_clip_tokenizer(folder: Path, *, pad: str) -> None:
    """Write the files of a CLIP tokenizer that pads with the token `pad`."""
    vocabulary = clip_vocabulary()
    write_json(folder / "vocab.json", dict(vocabulary.ids))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    roles = {
        "bos_token": _CLIP_BOS,
        "eos_token": CLIP_EOS,
        "unk_token": CLIP_EOS,
        "pad_token": pad,
    }
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": _CLIP_POSITIONS,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


_LLAMA_ROLES: Mapping[str, str] = MappingProxyType(
    {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
)

_T5_PIECES, _T5_SENTINELS = 212, 100

T5_VOCABULARY = _T5_PIECES + _T5_SENTINELS
"""The number of tokens that a T5 encoder must know."""


@cache
def _t5_pieces() -> bytes:
    """A SentencePiece model for T5: its first three pieces are padding, end and unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CAPTIONS.strip().splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=_T5_PIECES,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(ord("!"), ord("~") + 1))),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_t5_tokenizer(folder: Path, *, max_length: int, fast: bool) -> None:
    """Write a T5 tokenizer's files, with `tokenizer.json` beside the pieces if it is `fast`."""
    (folder / "spiece.model").write_bytes(_t5_pieces())
    roles = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": [f"<extra_id_{index}>" for index in range(_T5_SENTINELS)],
    }
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "extra_ids": _T5_SENTINELS,
            "legacy": True,
            "model_max_length": max_length,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
        },
    )
    if fast:
        converted = T5TokenizerFast.from_pretrained(folder).backend_tokenizer
        converted.save(str(folder / "tokenizer.json"))


@cache
def llama_bpe() -> Tokenizer:
    """Llama 3's kind of tokenizer, as HunyuanVideo's pipeline needs it.

    The pipeline wraps a prompt in an instruction and drops the first 95 tokens, the length of
    the instruction in Llama 3's tokenizer. Here each word of it is a token and so is each line
    break, which makes 96: none of the prompt is lost.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1024,
        special_tokens=[*_LLAMA_ROLES.values(), "<|start_header_id|>", "<|end_header_id|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"], _CAPTIONS], trainer)
    bos = _LLAMA_ROLES["bos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


_CHAT_PAD, _CHAT_BEGIN, _CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@cache
def chat_bpe() -> Tokenizer:
    """Qwen 3's kind of tokenizer, for prompts that are turns of a chat."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=[_CHAT_PAD, _CHAT_BEGIN, _CHAT_END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CAPTIONS], trainer)
    return tokenizer


def write_chat_tokenizer(folder: Path) -> None:
    """Write the files of the tokenizer above, with its template in a file of its own."""
    (folder / "tokenizer.json").write_text(chat_bpe().to_str(pretty=True), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    roles = {"eos_token": _CHAT_END, "pad_token": _CHAT_PAD}
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "model_max_length": 4096,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_llama_tokenizer(folder: Path) -> None:
    """Write the files of the tokenizer above."""
    (folder / "tokenizer.json").write_text(llama_bpe().to_str(pretty=True), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", dict(_LLAMA_ROLES))
    write_json(
        folder / "tokenizer_config.json",
        {
            **_LLAMA_ROLES,
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
