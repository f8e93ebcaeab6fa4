"""Whether a repository of the hub holds a model of text, and the entry for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.files.hub.repository import Repository
from engine.runtimes.recognised import Recognised
from engine.runtimes.vllm.checkpoint import position_count, said_length

MAX_MODEL_LEN = 8192
"""Tokens that a new entry allows at most. By default there is room for four requests of the
checkpoint's full length, which for 128 k tokens is more than the weights."""


TOOL_PARSERS = {
    "qwen2": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
    "smollm3": "hermes",
}
"""vLLM's parser of tool calls by `model_type`; Llama's goes by its vocabulary."""

REASONING_PARSERS = {"qwen3": "qwen3", "qwen3_moe": "qwen3", "smollm3": "qwen3"}
"""vLLM's parser of thoughts by `model_type`, for the checkpoints whose chat template has them."""

THINKING = "<think>"
"""What a chat template writes before thoughts, or to keep the model from them."""

CLASSIFIES = "ForSequenceClassification"
"""How the architectures end that give a text one score for each label."""

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Files with a chat template. The first one goes before the other."""

LLAMA_3_VOCABULARY = 128_256


def recognise_language_model(repository: Repository) -> Recognised | None:
    """The entry for a repository with `architectures` and safetensors; None for any other."""
    config = repository.config
    if not config.get("architectures") or not repository.has(".safetensors"):
        return None
    text: Mapping[str, Any] = config.get("text_config") or config
    options: dict[str, Any] = {}
    positions = position_count(text)
    if positions is not None:
        said = None
        if positions != text["max_position_embeddings"] and TOKENIZER_CONFIG in repository.paths:
            said = said_length(repository.json(TOKENIZER_CONFIG))
        options["max_model_len"] = min(positions, said or positions, MAX_MODEL_LEN)
    architectures = [str(name) for name in config["architectures"]]
    if task := _scoring_task(repository, architectures):
        return Recognised("vllm", task, options)
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
    if kind in REASONING_PARSERS and _thinks(repository):
        options["reasoning_parser"] = REASONING_PARSERS[kind]
    return Recognised("vllm", "generate", options)


def _thinks(repository: Repository) -> bool:
    """Whether the chat template knows thoughts. Qwen's Instruct models of 2507 have none."""
    if CHAT_TEMPLATE in repository.paths:
        return THINKING in repository.text(CHAT_TEMPLATE)
    if TOKENIZER_CONFIG not in repository.paths:
        return False
    settings = repository.json(TOKENIZER_CONFIG)
    return isinstance(settings, Mapping) and THINKING in str(settings.get("chat_template"))


def _scoring_task(repository: Repository, architectures: Sequence[str]) -> str | None:
    """The task of a model that scores texts; None: it does not.

    Qwen3-Reranker is published as a language model, so only its name tells.
    """
    if any(name.endswith(CLASSIFIES) for name in architectures):
        labels = repository.config.get("id2label") or repository.config.get("label2id")
        count = len(labels) if labels else repository.config.get("num_labels", 2)
        return "rerank" if count == 1 else "classify"
    if "Qwen3ForCausalLM" in architectures and "reranker" in repository.name.lower():
        return "rerank"
    return "rerank" if "JinaForRanking" in architectures else None


def _is_encoder(repository: Repository) -> bool:
    """Whether it makes embeddings: sentence-transformers' files, or a masked language model."""
    masked = any("MaskedLM" in str(name) for name in repository.config["architectures"])
    files = {"modules.json", "config_sentence_transformers.json"}
    return masked or bool(files & repository.paths)
