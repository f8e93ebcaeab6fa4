"""The form in which a reranker reads a query and a document.

A cross-encoder with a head of one label reads both with its tokenizer's separator. Qwen3-Reranker
is a language model: it reads a prompt, and its score is the probability of "yes" against "no" as
the next token. Without that exact prompt its scores are wrong. vLLM knows the head, but not the
prompt.

The prompt is the one of the model's page, https://huggingface.co/Qwen/Qwen3-Reranker-0.6B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.runtimes.vllm.options import VllmOptions

QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What Qwen3-Reranker is told to do where a request does not say."""

_SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and"
    ' the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: "
)
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def _literal(text: str) -> str:
    """A text in a template. A string keeps newlines that Jinja would strip."""
    return "{{ " + json.dumps(text) + " }}"


QWEN3_TEMPLATE = "".join(
    (
        _literal(_SYSTEM),
        "{{ instruction | default(" + json.dumps(QWEN3_INSTRUCTION) + ", true) }}",
        _literal("\n<Query>: "),
        "{{ (messages | selectattr('role', 'eq', 'query') | first).content }}",
        _literal("\n<Document>: "),
        "{{ (messages | selectattr('role', 'eq', 'document') | first).content }}",
        _literal(_ANSWER),
    )
)

_CLASSIFIER, _LANGUAGE_MODEL = "Qwen3ForSequenceClassification", "Qwen3ForCausalLM"
_ORIGINAL = {
    "architectures": [_CLASSIFIER],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
"""What vLLM must be told of the published checkpoint, to make one label of two tokens."""

INSTRUCTED = frozenset({"JinaForRanking"})
"""Architectures to which vLLM passes an instruction without a template."""


@dataclass(frozen=True, slots=True)
class RerankFormat:
    """How a pair is written, and what vLLM must be told of the checkpoint."""

    template: str | None = None
    """A Jinja template, or the path of one; None: the tokenizer joins the pair."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values over those of the checkpoint's configuration."""
    takes_instruction: bool = False


def rerank_format(config: Mapping[str, Any], options: VllmOptions) -> RerankFormat:
    """The format of a reranker with this `config.json`."""
    architectures = {str(each) for each in config.get("architectures") or ()}
    known = bool(architectures & {_CLASSIFIER, _LANGUAGE_MODEL})
    is_qwen3 = options.reranker == "qwen3" or (options.reranker == "auto" and known)
    overrides = _ORIGINAL if is_qwen3 and _LANGUAGE_MODEL in architectures else {}
    template = QWEN3_TEMPLATE if is_qwen3 else None
    if options.chat_template is not None:
        template = str(options.chat_template)
    instructed = template is not None or bool(architectures & INSTRUCTED)
    return RerankFormat(template, overrides, instructed)
