"""One request of each kind that imports or builds something when it is first used.

They run on the model of the warm-up. So no request of a client, and no model beside it, waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.requests import TextOperation, TextRequest

_ASK = [{"role": "user", "content": "hello"}]
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
_TENS = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 10}}}
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}]


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


_CHATS: tuple[Mapping[str, Any], ...] = (
    {"n": 2, "stream": True, "seed": 1},
    {"temperature": 0, "logprobs": True, "top_logprobs": 1},
    {"presence_penalty": 1, "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "min_tokens": 2},
    {"min_p": 0.1, "top_k": 5, "top_p": 0.5, "bad_words": ["a"], "stop": ["x"]},
    {"use_beam_search": True, "n": 2},
    {"response_format": {"type": "json_object"}},
    {"response_format": _schema(_SCHEMA)},
    {"response_format": _schema(_TENS)},  # a rule that needs the other backend
    {"structured_outputs": {"regex": "[ab]{2}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"tools": _TOOLS},
    {"tools": _TOOLS, "stream": True},
    {"tools": _TOOLS, "tool_choice": "required"},
    {"tools": _TOOLS, "tool_choice": "required", "stream": True},
)

_BODIES: tuple[tuple[TextOperation, Mapping[str, Any]], ...] = (
    *((TextOperation.CHAT, {"messages": _ASK, "max_tokens": 4, **chat}) for chat in _CHATS),
    (TextOperation.COMPLETION, {"prompt": "hello", "max_tokens": 2, "prompt_logprobs": 1}),
    (TextOperation.RESPONSES, {"input": "hello", "max_output_tokens": 4}),
    (TextOperation.RESPONSES, {"input": "hello", "max_output_tokens": 4, "stream": True}),
    (TextOperation.MESSAGES, {"messages": _ASK, "max_tokens": 4}),
    (TextOperation.MESSAGES, {"messages": _ASK, "max_tokens": 4, "stream": True}),
    (TextOperation.COUNT_TOKENS, {"messages": _ASK}),
    (TextOperation.TOKENIZE, {"prompt": "hello"}),
    (TextOperation.DETOKENIZE, {"tokens": [5]}),
)


def warm_up_requests(model: str) -> Iterator[TextRequest]:
    """The requests, for a model that has a tool parser."""
    for index, (operation, body) in enumerate(_BODIES):
        yield TextRequest(model, operation, body, request_id=f"warm-up-{index}")
