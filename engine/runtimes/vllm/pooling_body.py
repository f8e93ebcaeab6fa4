"""The documents of rerank, score, classify, moderation and fill-mask, made into those of schemas.

A rerank may be Cohere's, Jina's or vLLM's own. They agree on the query, its documents and how many
results there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.requests import TextOperation
from engine.runtimes.vllm.fill_mask import flat_body
from engine.words import echoed

MOST_TEXTS = 10_000
"""Documents of a request, and inputs of a moderation. Each is a request to vLLM."""

QUERIES = ("query", "queries", "text_1", "data_1")
DOCUMENTS = ("documents", "items", "text_2", "data_2")

TRUNCATION = ("truncate", "truncation")
"""What others call "cut what is too long"."""

RERANK_ONLY = frozenset({"max_chunks_per_doc", "rank_fields", "return_documents"})
"""Fields of Cohere's and Jina's that vLLM's schema has not."""

LIMITS = ("max_tokens_per_doc", "max_tokens_per_query")


def pooling_body(operation: TextOperation, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body for vLLM's schema of the operation.

    Raises:
        InvalidRequest: naming the field at fault.

    """
    match operation:
        case TextOperation.RERANK | TextOperation.SCORE:
            return _scored(operation, body)
        case TextOperation.MODERATION:
            return _moderated(body)
        case TextOperation.FILL_MASK:
            given = flat_body(body)
            if isinstance(given.get("inputs"), list):
                given["inputs"] = _texts(given["inputs"], "inputs")
            return given
    return dict(body)


def _scored(operation: TextOperation, body: Mapping[str, Any]) -> dict[str, Any]:
    reranks = operation is TextOperation.RERANK
    # Null means the default, which vLLM's schema does not know of all fields.
    given = {name: value for name, value in body.items() if value is not None}
    for name in QUERIES:
        if name in given and not isinstance(given[name], list):
            given[name] = _text(given[name], name)
    for name in (*QUERIES, *DOCUMENTS):
        if isinstance(given.get(name), list):
            given[name] = _texts(given[name], name)
    if reranks:
        _take_rerank_fields(given)
    for name in TRUNCATION:
        value = given.pop(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name}: it is true or false.", param=name)
        if value:
            given.setdefault("truncate_prompt_tokens", -1)
    return given


def _take_rerank_fields(given: dict[str, Any]) -> None:
    if isinstance(given.get("query"), list):
        raise InvalidRequest("query: it is one text.", param="query")
    if "documents" in given and not isinstance(given["documents"], list):
        raise InvalidRequest("documents: it is a list.", param="documents")
    if not isinstance(given.get("return_documents", True), bool):
        raise InvalidRequest("return_documents: it is true or false.", param="return_documents")
    if given.get("rank_fields", ["text"]) != ["text"]:
        raise InvalidRequest("rank_fields: only ['text'] is ranked here.", param="rank_fields")
    if given.get("max_chunks_per_doc", 1) != 1:
        raise InvalidRequest(
            "max_chunks_per_doc: a document is one chunk here; use 'max_tokens_per_doc'.",
            param="max_chunks_per_doc",
        )
    for name in RERANK_ONLY:
        given.pop(name, None)


def _texts(values: list[Any], param: str) -> list[str]:
    if not 1 <= len(values) <= MOST_TEXTS:
        raise InvalidRequest(f"{param}: it holds 1 to {MOST_TEXTS} texts.", param=param)
    return [_text(each, f"{param}[{index}]") for index, each in enumerate(values)]


def _text(value: Any, param: str) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        value = value["text"]
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}: it is a text, or an object with 'text'.", param=param)
    return value


def _moderated(body: Mapping[str, Any]) -> dict[str, Any]:
    unknown = next((name for name in body if name not in ("input", "model")), None)
    if unknown is not None:
        raise InvalidRequest(f"Unknown parameter: {echoed(unknown)}.", param=unknown)
    inputs = body.get("input")
    if isinstance(inputs, str):
        inputs = [inputs]
    if not isinstance(inputs, list):
        raise InvalidRequest("input: it is a text or a list.", param="input")
    if any(isinstance(each, Mapping) for each in inputs):
        # One input in parts. Of a list of texts, each is an input of its own.
        inputs = ["\n".join(_part(each, index) for index, each in enumerate(inputs))]
    return {"model": body.get("model"), "input": _texts(inputs, "input")}


def _part(part: Any, index: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        said = f"{echoed(kind)} is not served here, only text" if kind else "it is a part with text"
        raise InvalidRequest(f"input[{index}]: {said}.", param=f"input[{index}]")
    return str(part["text"])


def check_format(body: Mapping[str, Any], *, templated: bool, takes_instruction: bool) -> None:
    """Refuse what a reranker of this form cannot do.

    Raises:
        InvalidRequest: naming the field.

    """
    if not takes_instruction:
        for name in ("instruction", "chat_template_kwargs"):
            if body.get(name):
                raise InvalidRequest(f"{name}: the model takes no instruction.", param=name)
    if templated:
        for name in ("truncate_prompt_tokens", *TRUNCATION):
            if body.get(name) not in (None, False):
                raise InvalidRequest(
                    f"{name}: it would cut the end of the model's prompt; use"
                    " 'max_tokens_per_doc'.",
                    param=name,
                )
