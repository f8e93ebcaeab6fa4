"""GGUF files that are not converted, each refused by name before anything is written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine.conversion.header import GgufHeader
from engine.errors import LoadFailed
from engine.units import format_size

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

ARCHITECTURES = (
    "gemma2",
    "gemma3",
    "llama",
    "phi3",
    "qwen2",
    "qwen3",
)
"""What is converted: transformers reads these, and what it leaves out is mended here."""

TAKE_THE_ORIGINAL = (
    "take the repository that it was made from, with config.json and .safetensors files"
)

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")

_OTHER_FILES = {
    "adapter": "a LoRA adapter. Adapters are read as safetensors: take the repository of the LoRA",
    "mmproj": "the projector of a vision model (mmproj), with no language model in it",
    "imatrix": "an importance matrix for quantising, with no model in it",
}
"""By `general.type`, where that is not `model`."""

_SHAPE_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "vocab_size",
    }
)
"""Keys that the conversion reads, after the architecture's name."""

_MORE_KEYS = {
    "gemma2": {
        "attention.sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    },
    "gemma3": {
        "attention.sliding_window",
        "final_logit_softcapping",
        "rope.freq_base_swa",
    },
    "phi3": {"attention.sliding_window"},
}

_REASONS = {
    "expert_count": "a mixture of experts",
    "pooling_type": "an embedding model",
    "vision": "a vision model in one file, as Ollama makes them",
}
"""What a key that is not read, or the first word of it, says about the model."""


def check(header: GgufHeader) -> None:
    """Refuse a file that cannot be converted to a model that answers as the file would.

    Raises:
        LoadFailed: with what is wrong, and what to do.

    """
    name = header.file.name
    _check_kind(header, name)
    _check_parts(header, name)
    if header.architecture not in ARCHITECTURES:
        raise LoadFailed(
            f"{name} has the architecture {header.architecture!r}, which is not converted; these"
            f" are: {', '.join(ARCHITECTURES)}. For another, {TAKE_THE_ORIGINAL}"
        )
    if not header.tensors:
        raise LoadFailed(f"{name} holds a vocabulary only, and no weights")
    _check_keys(header, name)
    _check_tensors(header, name)


def _check_kind(header: GgufHeader, name: str) -> None:
    kind = str(header.metadata.get("general.type") or "model")
    if "adapter.type" in header.metadata:
        kind = "adapter"
    elif header.architecture == "clip":
        kind = "mmproj"
    if kind != "model":
        raise LoadFailed(f"{name} is {_OTHER_FILES.get(kind, f'no model but {kind!r}')}")
    if not header.architecture:
        raise LoadFailed(f"{name} does not say its architecture (general.architecture)")


def _check_parts(header: GgufHeader, name: str) -> None:
    part = _SHARD.search(header.file.stem)
    count = int(part[2]) if part else header.metadata.get("split.count") or 1
    if count > 1:
        raise LoadFailed(
            f"{name} is one of {count} parts. Join them with `llama-gguf-split --merge FIRST-PART"
            " WHOLE.gguf` of llama.cpp, and add the whole"
        )


def _check_keys(header: GgufHeader, name: str) -> None:
    """Every fact about the model is read, or else is what a model without it has."""
    prefix = f"{header.architecture}."
    known = _SHAPE_KEYS | _MORE_KEYS.get(header.architecture, set())
    for key, value in header.metadata.items():
        if not key.startswith(prefix) or not value:
            continue
        short = key.removeprefix(prefix)
        if short not in known:
            what = f" ({_REASONS[topic]})" if (topic := short.split(".")[0]) in _REASONS else ""
            raise LoadFailed(
                f"{name} has {key} = {value!r:.60}{what}, which the conversion does not know; "
                + TAKE_THE_ORIGINAL
            )
    for short in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(header.of_model(short), list):
            raise LoadFailed(
                f"{name} has a {prefix}{short} for each layer, which the conversion does not know;"
                f" {TAKE_THE_ORIGINAL}"
            )
    for short in ("block_count", "context_length", "embedding_length", "attention.head_count"):
        if not header.of_model(short):
            raise LoadFailed(f"{name} is damaged: its header has no {prefix}{short}")


def _check_tensors(header: GgufHeader, name: str) -> None:
    end = header.data_start
    for tensor in header.tensors:
        kind = _number_format(tensor.type_id)
        if kind is None or not _is_read(kind):
            what = kind.name if kind is not None else f"number {tensor.type_id}"
            raise LoadFailed(
                f"{name} has tensors in the number format {what}, which the package gguf cannot"
                f" dequantise; take another quantisation, such as Q8_0 or Q4_K_M ({tensor.name})"
            )
        end = max(end, header.data_start + tensor.offset + _bytes(kind, tensor.elements))
    if end > header.nbytes:
        raise LoadFailed(
            f"{name} is cut off: it has {format_size(header.nbytes)} of {format_size(end)}. The"
            " download broke off: fetch it again"
        )


def _number_format(type_id: int) -> GGMLQuantizationType | None:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id)
    except ValueError:
        return None


def _is_read(kind: GGMLQuantizationType) -> bool:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    if kind.name in ("F32", "F16"):
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def _bytes(kind: GGMLQuantizationType, elements: int) -> int:
    from gguf import GGML_QUANT_SIZES

    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    return int(elements // block_elements * block_bytes)
