"""The configuration of the model in a GGUF file: transformers', with what it leaves out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engine.conversion.header import GgufHeader
from engine.conversion.refusals import TAKE_THE_ORIGINAL
from engine.conversion.tokenizer import ends_of_answer
from engine.errors import LoadFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GenerationConfig, PretrainedConfig

LLAMA3_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_POSITIONS = 8192
"""What Llama 3.1 to 3.3 have in common; their factors differ (8 and 32)."""

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_NOT_OF_THE_MODEL = (
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "quantization_config",
    "unk_token_id",
)
"""What transformers adds to the configuration of a GGUF file. Saving writes `architectures`."""

TENSORS_OF_CONFIG = frozenset({FREQUENCIES, LONG, SHORT})
"""Tensors that a model of Hugging Face has in its configuration."""


def model_config(header: GgufHeader) -> PretrainedConfig:
    """The configuration, which must mean what the header says.

    Raises:
        LoadFailed: the model has a shape that the configuration cannot express.

    """
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(str(header.file.parent), gguf_file=header.file.name)
    values = read.to_dict()
    for gone in _NOT_OF_THE_MODEL:
        values.pop(gone, None)
    values |= _attention(header, values)
    values["rope_parameters"] = _rope(header, values)
    if header.architecture == "phi3":
        values["original_max_position_embeddings"] = header.of_model(
            "rope.scaling.original_context_length", header.of_model("context_length")
        )
    tokens = ends_of_answer(header)
    values["bos_token_id"] = header.of_tokenizer("bos_token_id")
    values["eos_token_id"] = tokens[0] if len(tokens) == 1 else tokens or None
    values["pad_token_id"] = header.of_tokenizer("padding_token_id")
    config = type(read)(**values)
    config.dtype = "bfloat16"
    return config


def generation_config(config: PretrainedConfig) -> GenerationConfig:
    """Where an answer ends. A GGUF file says nothing of how to sample."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _attention(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    name, kind = header.file.name, header.architecture
    heads = header.of_model("attention.head_count")
    head_dim = header.of_model("attention.key_length") or values["hidden_size"] // heads
    if header.of_model("attention.value_length", head_dim) != head_dim:
        raise LoadFailed(
            f"{name} has keys and values of different lengths, which {kind} of Hugging Face does"
            f" not have; {TAKE_THE_ORIGINAL}"
        )
    changed: dict[str, Any] = {
        "num_key_value_heads": header.of_model("attention.head_count_kv", heads)
    }
    if kind != "phi3":
        changed["head_dim"] = head_dim
    names = header.tensor_names
    if kind == "llama":
        changed["attention_bias"] = "blk.0.attn_q.bias" in names
        changed["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if kind in ("gemma2", "gemma3"):
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            changed[key] = header.of_model(key, values[key])
    if kind in ("gemma2", "gemma3"):
        # llama.cpp, too, knows the 27B by its layers: the file does not say it.
        large = header.of_model("block_count") == {"gemma2": 46, "gemma3": 62}[kind]
        changed["query_pre_attn_scalar"] = values["hidden_size"] // heads if large else head_dim
    if kind == "phi3":
        changed["sliding_window"] = header.of_model("attention.sliding_window") or None
    return changed


def _rope(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding, of which transformers reads the base alone."""
    name, kind = header.file.name, header.architecture
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rope: dict[str, Any] = {"rope_theta": header.of_model("rope.freq_base", 10_000.0)}
    rotary = header.of_model("rope.dimension_count", head_dim)
    if rotary != head_dim:
        if kind != "phi3":
            raise LoadFailed(
                f"{name} rotates {rotary} of {head_dim} dimensions of a head, which {kind} of"
                f" Hugging Face does not; {TAKE_THE_ORIGINAL}"
            )
        rope["partial_rotary_factor"] = rotary / head_dim
    rope |= _scaling(header)
    if kind != "gemma3":
        return rope
    local = {
        "rope_type": "default",
        "rope_theta": header.of_model("rope.freq_base_swa", 10_000.0),
    }
    return {"full_attention": rope, "sliding_attention": local}


def _scaling(header: GgufHeader) -> dict[str, Any]:
    name = header.file.name
    tensors = header.tensor_names
    if FREQUENCIES in tensors:
        return _llama3(header)
    original = header.of_model("rope.scaling.original_context_length")
    if LONG in tensors or SHORT in tensors:
        scaling = {
            "rope_type": "longrope",
            "long_factor": _numbers(header, LONG),
            "short_factor": _numbers(header, SHORT),
            "original_max_position_embeddings": original,
        }
        if (factor := header.of_model("rope.scaling.attn_factor")) is not None:
            scaling["attention_factor"] = factor
        return scaling
    kind = header.of_model("rope.scaling.type") or "none"
    factor = header.of_model("rope.scaling.factor")
    if header.of_model("rope.scaling.attn_factor", 1.0) != 1.0:
        kind = f"{kind} with an attn_factor"
    elif kind == "none" or not factor or factor == 1.0:
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise LoadFailed(
        f"{name} scales its positions by {kind!r}, which is not converted; {TAKE_THE_ORIGINAL}"
    )


def _llama3(header: GgufHeader) -> dict[str, Any]:
    """The scaling of Llama 3.1 to 3.3, of which the file has only the result for each frequency."""
    factors = _numbers(header, FREQUENCIES)
    base = header.of_model("rope.freq_base", 10_000.0)
    scaling = {
        "rope_type": "llama3",
        "factor": float(max(factors)),
        "original_max_position_embeddings": LLAMA3_POSITIONS,
        **LLAMA3_FREQUENCIES,
    }
    if any(
        not math.isclose(found, wanted, rel_tol=1e-3)
        for found, wanted in zip(
            factors, _llama3_factors(max(factors), base, len(factors)), strict=True
        )
    ):
        raise LoadFailed(
            f"{header.file.name} scales its positions ({FREQUENCIES}) in another way than Llama 3,"
            f" which is not converted; {TAKE_THE_ORIGINAL}"
        )
    return scaling


def _llama3_factors(factor: float, base: float, count: int) -> list[float]:
    """By what each wavelength is stretched: the long ones by all, the short ones by nothing."""
    low, high = LLAMA3_FREQUENCIES["low_freq_factor"], LLAMA3_FREQUENCIES["high_freq_factor"]
    factors = []
    for index in range(count):
        wavelength = 2 * math.pi * base ** (index / count)
        smooth = (LLAMA3_POSITIONS / wavelength - low) / (high - low)
        factors.append(1 / ((1 - (part := min(max(smooth, 0.0), 1.0))) / factor + part))
    return factors


def _numbers(header: GgufHeader, tensor_name: str) -> Sequence[float]:
    """The numbers of a small tensor of 32 bits."""
    import numpy as np

    found = next((each for each in header.tensors if each.name == tensor_name), None)
    if found is None or found.type_id != 0:
        raise LoadFailed(f"{header.file.name} is damaged: {tensor_name} is missing or no float32")
    with header.file.open("rb") as file:
        file.seek(header.data_start + found.offset)
        data = np.frombuffer(file.read(found.elements * 4), "<f4")
    return [float(f"{number:.7g}") for number in data]
