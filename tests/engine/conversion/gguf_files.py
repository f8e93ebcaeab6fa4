"""GGUF files of tiny models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from engine.starters.registry import ensure_starter

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"

SHAPE = {
    "context_length": 256,
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def vocabulary(cache_dir: Path) -> dict[str, Any]:
    """The tokenizer of `starter:tiny-llama`: the keys of a GGUF file by their last words."""
    folder = ensure_starter("tiny-llama", cache_dir)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(document["model"]["vocab"])
    kinds = dict.fromkeys(ids, 1)
    for added in document["added_tokens"]:
        ids[added["content"]] = added["id"]
        kinds[added["content"]] = 3 if added["special"] else 4
    tokens = sorted(ids, key=lambda token: ids[token])
    return {
        "tokens": tokens,
        "token_type": [kinds[token] for token in tokens],
        "merges": [
            each if isinstance(each, str) else " ".join(each)
            for each in document["model"]["merges"]
        ],
    }


def write_gguf(
    file: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    shape: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    *,
    quantised: GGMLQuantizationType | None = None,
    **others: Any,
) -> Path:
    """Write a file; `tokenizer` has the keys after `tokenizer.ggml.`, `others` whole keys."""
    writer = GGUFWriter(file, architecture)
    values = {
        **{f"{architecture}.{key}": value for key, value in shape.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()},
        **others,
    }
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    for name, data in tensors.items():
        if quantised is not None and data.ndim == 2:
            writer.add_tensor(name, quants.quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
