"""Whether a repository of the hub holds a language or embedding model, and the entry for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.files.hub.repository import Repository
from engine.runtimes.recognised import Recognised

MAX_MODEL_LEN = 8192
"""Tokens that a new entry allows at most. By default there is room for four requests of the
checkpoint's full length, which for 128 k tokens is more than the weights."""


TOOL_PARSERS = {"qwen2": "hermes", "qwen3": "hermes", "qwen3_moe": "hermes"}
"""vLLM's parser of tool calls by `model_type`; Llama's goes by its vocabulary."""


LLAMA_3_VOCABULARY = 128_256


def recognise_language_model(repository: Repository) -> Recognised | None:
    """The entry for a repository with `architectures` and safetensors; None for any other."""
    config = repository.config
    if not config.get("architectures") or not repository.has(".safetensors"):
        return None
    text: Mapping[str, Any] = config.get("text_config") or config
    options: dict[str, Any] = {}
    positions = text.get("max_position_embeddings")
    if isinstance(positions, int):
        options["max_model_len"] = min(positions, MAX_MODEL_LEN)
    architectures = config["architectures"]
    generates = any("For" in str(name) for name in architectures) and not _is_encoder(repository)
    if not generates:
        return Recognised("vllm", "embed", options)
    kind = str(config.get("model_type") or "")
    if "deepseek-r1" in repository.name.lower():
        options["reasoning_parser"] = "deepseek_r1"
    elif kind == "llama" and text.get("vocab_size") == LLAMA_3_VOCABULARY:
        options["tool_call_parser"] = "llama3_json"
    elif kind in TOOL_PARSERS:
        options["tool_call_parser"] = TOOL_PARSERS[kind]
    return Recognised("vllm", "generate", options)


def _is_encoder(repository: Repository) -> bool:
    """Whether it makes embeddings: sentence-transformers' files, or a masked language model."""
    masked = any("MaskedLM" in str(name) for name in repository.config["architectures"])
    files = {"modules.json", "config_sentence_transformers.json"}
    return masked or bool(files & repository.paths)
