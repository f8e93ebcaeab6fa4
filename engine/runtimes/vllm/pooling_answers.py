"""vLLM's answers of rerankers and classifiers, in the documents that clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.runtimes.vllm.options import ModerationOptions

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's. An answer has all of them; one that the model has no label for is never flagged."""


def rerank_document(answer: bytes, body: Mapping[str, Any]) -> bytes:
    """The answer to a rerank: `results` by falling score, as Cohere, Jina and vLLM have them.

    The texts are those of the request: what vLLM was given may have a prompt before it.
    """
    found = json.loads(answer)
    documents = body["documents"] if body.get("return_documents") in (None, True) else None
    results = []
    for result in found["results"]:
        index = result["index"]
        entry = {"index": index, "relevance_score": result["relevance_score"]}
        if documents is not None:
            sent = documents[index]
            entry["document"] = {"text": sent} if isinstance(sent, str) else dict(sent)
        results.append(entry)
    tokens = found["usage"]["prompt_tokens"]
    return _encoded(
        {
            "id": found["id"],
            "object": "list",
            "model": found["model"],
            "results": results,
            "usage": found["usage"],
            "meta": {"tokens": {"input_tokens": tokens, "output_tokens": 0}},
        }
    )


def moderation_document(
    answer: bytes, labels: Sequence[str], options: ModerationOptions, *, exclusive: bool
) -> bytes:
    """The answer to a moderation, from the probabilities of a classifier's labels.

    `exclusive` says that the probabilities of a text add up to 1. Then those of a category do, too;
    otherwise the largest counts.
    """
    found = json.loads(answer)
    results = [_moderated(each["probs"], labels, options, exclusive) for each in found["data"]]
    return _encoded(
        {
            "id": found["id"].replace("classify-", "modr-", 1),
            "model": found["model"],
            "results": results,
        }
    )


def _moderated(
    probabilities: Sequence[float],
    labels: Sequence[str],
    options: ModerationOptions,
    exclusive: bool,
) -> dict[str, Any]:
    scores = dict.fromkeys(CATEGORIES, 0.0)
    covered = set()
    for label, probability in zip(labels, probabilities, strict=True):
        category = options.categories[label]
        if category is None:
            continue
        covered.add(category)
        known = scores.get(category, 0.0)
        scores[category] = known + probability if exclusive else max(known, probability)
    scores = {category: min(1.0, score) for category, score in scores.items()}
    flags = {category: score >= options.threshold for category, score in scores.items()}
    return {
        "flagged": any(flags.values()),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {
            category: ["text"] if category in covered else [] for category in scores
        },
    }


def _encoded(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
