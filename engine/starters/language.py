"""The starter models that read and write text: three that write, and three of BERT's kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from engine.starters.chat_templates import IDEFICS_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE
from engine.starters.json_text import write_json
from engine.starters.sight import (
    END,
    IMAGE,
    IMAGE_TOKENS,
    SHUFFLE,
    VISION_CONFIG,
    vision_tensors,
    write_processor,
)
from engine.starters.tensors import RandomTensors, Tensors, write_tensors

VOCABULARY_SIZE = 512

_CORPUS = """
The quick brown fox jumps over the lazy dog while the engine waits in the roundhouse. A
locomotive stands on the turntable, and the driver asks for another track. What is the
weather in Paris today? It will be sunny with a light wind from the west. Please write a short
story about a small robot that learns to paint. Once upon a time there was a king who had three
daughters. Explain how memory is shared between models: every byte is counted before it is used,
and given back when the work is done. Hello, how are you? I am fine, thank you, and how can I help
you with this question? You are a helpful assistant. Answer in one sentence. First, second and
third; one, two, three, four and five. {"name": "get_weather", "arguments": {"location": "Berlin",
"unit": "celsius"}} {"type": "function", "parameters": {"properties": {}, "required": []}}
def main(): return [value for value in items if value is not None] # a comment
There should be something interesting here, because nothing that they would have said could
make people forget where those other things were found before the station was closed.
"""
"""The text from which the byte-pair merges are learned: English and JSON for a vocabulary."""


@dataclass(frozen=True, slots=True)
class _DecoderShape:
    """The sizes of a Llama-like decoder; `head_dim` is the width of one attention head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 32
    positions: int = 8192


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The sizes of a BERT."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    positions: int = 8192


def _write_tiny_llama(folder: Path) -> None:
    bos, eot, pad = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
    tokenizer = _tokenizer(
        [bos, eot, "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", pad]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    shape = _DecoderShape(hidden=256, intermediate=512, layers=4, heads=8, kv_heads=4)
    ids = {
        "bos_token_id": tokenizer.token_to_id(bos),
        "eos_token_id": tokenizer.token_to_id(eot),
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_decoder_config(shape, tokenizer),
        **ids,
        "head_dim": shape.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
    }
    tensors = _decoder_tensors(RandomTensors(seed=5), shape, tokenizer, eot, qkv_bias=False)
    _write_tokenizer(
        folder,
        tokenizer,
        {"bos_token": bos, "eos_token": eot, "pad_token": pad},
        max_length=shape.positions,
        chat_template=LLAMA_TEMPLATE,
    )
    write_model(folder, config, tensors)
    write_json(folder / "generation_config.json", ids)


def _write_tiny_qwen(folder: Path) -> None:
    pad, eos = "<|endoftext|>", "<|im_end|>"
    tokenizer = _tokenizer([pad, "<|im_start|>", eos], tags=["<tool_call>", "</tool_call>"])
    shape = _DecoderShape(hidden=192, intermediate=384, layers=3, heads=6, kv_heads=2)
    ids = {
        "bos_token_id": tokenizer.token_to_id(pad),
        "eos_token_id": tokenizer.token_to_id(eos),
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_decoder_config(shape, tokenizer),
        **ids,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    }
    tensors = _decoder_tensors(RandomTensors(seed=2), shape, tokenizer, eos, qkv_bias=True)
    _write_tokenizer(
        folder,
        tokenizer,
        {"eos_token": eos, "pad_token": pad},
        max_length=shape.positions,
        chat_template=QWEN_TEMPLATE,
    )
    write_model(folder, config, tensors)
    write_json(folder / "generation_config.json", ids)


def _write_tiny_idefics3(folder: Path) -> None:
    pad, start = "<|endoftext|>", "<|im_start|>"
    tokenizer = _tokenizer([pad, start, *IMAGE_TOKENS])
    shape = _DecoderShape(hidden=192, intermediate=384, layers=3, heads=6, kv_heads=2)
    ids = {
        "bos_token_id": tokenizer.token_to_id(start),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    text = _decoder_config(shape, tokenizer)
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "dtype": "float32",
        **ids,
        "image_token_id": tokenizer.token_to_id(IMAGE),
        "scale_factor": SHUFFLE,
        "tie_word_embeddings": False,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **text,
            **ids,
            "head_dim": shape.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 500000.0,
        },
        "vision_config": VISION_CONFIG,
    }
    weights = RandomTensors(seed=9)
    decoder = _decoder_tensors(weights, shape, tokenizer, END, qkv_bias=False)
    tensors = {
        f"model.text_model.{name.removeprefix('model.')}"
        if name.startswith("model.")
        else name: each
        for name, each in decoder.items()
    }
    tensors |= vision_tensors(weights, shape.hidden)
    _write_tokenizer(
        folder,
        tokenizer,
        {"bos_token": start, "eos_token": END, "pad_token": pad},
        max_length=shape.positions,
        chat_template=IDEFICS_TEMPLATE,
    )
    write_model(folder, config, tensors)
    write_json(folder / "generation_config.json", ids)
    write_processor(folder)


def _write_tiny_embed(folder: Path) -> None:
    # Any leading part of a random vector is as good an embedding as the whole. So a request
    # may choose its `dimensions`.
    shape = EncoderShape()
    own = {"architectures": ["BertModel"], "is_matryoshka": True}
    _write_bert(folder, shape, own, RandomTensors(seed=3))
    _write_sentence_transformer(folder, shape.hidden, shape.positions)


def _write_tiny_rerank(folder: Path) -> None:
    own = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    _write_bert(folder, EncoderShape(positions=2048), own, RandomTensors(seed=7), labels=1)


def _write_tiny_classify(folder: Path) -> None:
    labels = ("OK", "harassment", "hate", "sexual", "violence")
    own = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    shape = EncoderShape(positions=2048)
    _write_bert(folder, shape, own, RandomTensors(seed=8), labels=len(labels))


def _write_bert(
    folder: Path,
    shape: EncoderShape,
    own: Mapping[str, Any],
    weights: RandomTensors,
    labels: int = 0,
) -> None:
    """Write a BERT, with a head for `labels` if there are any."""
    pad, cls, sep = "[PAD]", "[CLS]", "[SEP]"
    hidden, positions = shape.hidden, shape.positions
    tokenizer = _tokenizer([pad, cls, sep])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    config = {
        "model_type": "bert",
        **own,
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    tensors: Tensors = {
        "embeddings.word_embeddings.weight": weights.normal(
            tokenizer.get_vocab_size(), hidden, std=1.0
        ),
        # Small, so that texts with the same words are near each other, whatever their order.
        "embeddings.position_embeddings.weight": weights.normal(positions, hidden, std=0.1),
        "embeddings.token_type_embeddings.weight": weights.normal(2, hidden, std=0.1),
        **layer_norm("embeddings.LayerNorm", hidden),
    }
    tensors |= encoder_layers(weights, shape)
    tensors["pooler.dense.weight"] = weights.linear(hidden, hidden)
    tensors["pooler.dense.bias"] = np.zeros(hidden, np.float32)
    if labels:
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
        # Sharp, so that texts differ in their labels.
        tensors["classifier.weight"] = weights.linear(labels, hidden, gain=4.0)
        tensors["classifier.bias"] = np.zeros(labels, np.float32)

    _write_tokenizer(
        folder,
        tokenizer,
        {"cls_token": cls, "sep_token": sep, "pad_token": pad},
        max_length=positions,
    )
    write_model(folder, config, tensors)


def encoder_layers(weights: RandomTensors, shape: EncoderShape) -> Tensors:
    """The layers of a BERT, whose names the other families have, too."""
    hidden, intermediate = shape.hidden, shape.intermediate
    tensors: Tensors = {}
    for index in range(shape.layers):
        layer = f"encoder.layer.{index}"
        for part, outputs, inputs in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", intermediate, hidden),
            ("output.dense", hidden, intermediate),
        ):
            tensors[f"{layer}.{part}.weight"] = weights.linear(outputs, inputs)
            tensors[f"{layer}.{part}.bias"] = np.zeros(outputs, np.float32)
        tensors |= layer_norm(f"{layer}.attention.output.LayerNorm", hidden)
        tensors |= layer_norm(f"{layer}.output.LayerNorm", hidden)
    return tensors


def _tokenizer(specials: Sequence[str], tags: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY_SIZE` tokens: the specials, then the 256 bytes, then merges.

    `tags` are whole tokens at the end. Decoding keeps them, unlike specials.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(tags),
        special_tokens=list(specials),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return tokenizer


def _decoder_config(shape: _DecoderShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
    }


def _decoder_tensors(
    weights: RandomTensors, shape: _DecoderShape, tokenizer: Tokenizer, eos: str, *, qkv_bias: bool
) -> Tensors:
    """The weights of a Llama-like decoder, by their names in a checkpoint.

    Random weights of the usual scale would repeat one token for ever: the embedding of the last
    token outweighs the sum of the layers. Small embeddings and sharp attention let the whole
    context decide the next token.
    """
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    vocabulary_size = tokenizer.get_vocab_size()
    tensors: Tensors = {
        "model.embed_tokens.weight": weights.normal(vocabulary_size, shape.hidden, std=0.3),
        "model.norm.weight": np.ones(shape.hidden, np.float32),
        "lm_head.weight": _head(weights, shape.hidden, tokenizer, eos),
    }
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for part, outputs, inputs, gain in (
            ("self_attn.q_proj", q_width, shape.hidden, 3.0),
            ("self_attn.k_proj", kv_width, shape.hidden, 3.0),
            ("self_attn.v_proj", kv_width, shape.hidden, 1.0),
            ("self_attn.o_proj", shape.hidden, q_width, 1.0),
            ("mlp.gate_proj", shape.intermediate, shape.hidden, 1.0),
            ("mlp.up_proj", shape.intermediate, shape.hidden, 1.0),
            ("mlp.down_proj", shape.hidden, shape.intermediate, 1.0),
        ):
            tensors[f"{layer}.{part}.weight"] = weights.linear(outputs, inputs, gain)
            if qkv_bias and part.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{layer}.{part}.bias"] = weights.normal(outputs, std=0.05)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = np.ones(shape.hidden, np.float32)
    return tensors


def _head(
    weights: RandomTensors, hidden: int, tokenizer: Tokenizer, eos: str
) -> NDArray[np.float32]:
    """The output projection: logits with a spread of about 3.5 for readable tokens.

    Control tokens and bytes beyond ASCII get a logit of zero. Among some 300 others of that
    spread it is hardly ever chosen, so answers are readable, if meaningless. The end of the
    answer gets a wider spread than the rest, so that it comes after about a hundred tokens.
    """
    head = weights.linear(tokenizer.get_vocab_size(), hidden, gain=3.5)
    end = tokenizer.token_to_id(eos)
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        if token == end:
            head[token] *= 1.15
        elif not text or not text.isascii() or not text.isprintable():
            head[token] = 0.0
    return head


def layer_norm(name: str, width: int) -> Tensors:
    """One that changes nothing yet."""
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }


def _write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    roles: Mapping[str, str],
    *,
    max_length: int,
    chat_template: str | None = None,
) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def write_model(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write the configuration and the weights."""
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)


def _write_sentence_transformer(folder: Path, dimensions: int, positions: int) -> None:
    """The files that tell sentence-transformers and vLLM how token vectors become one."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (path, kind) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": dimensions, "pooling_mode_mean_tokens": True},
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False}
    )


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "tiny-llama": _write_tiny_llama,
        "tiny-qwen": _write_tiny_qwen,
        "tiny-idefics3": _write_tiny_idefics3,
        "tiny-embed": _write_tiny_embed,
        "tiny-rerank": _write_tiny_rerank,
        "tiny-classify": _write_tiny_classify,
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
