"""What becomes of each field of a text request: it works, has no effect, or is refused.

vLLM takes unknown fields in silence, and some of those that it knows have no effect. Here a field
that nobody knows is refused by name, as is one that asks for what this server does not have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.requests import TextOperation
from engine.runtimes.vllm.prompts import FIELDS as PROMPT_FIELDS
from engine.words import echoed

CHAT, COMPLETION = TextOperation.CHAT, TextOperation.COMPLETION
RESPONSES, MESSAGES = TextOperation.RESPONSES, TextOperation.MESSAGES
INPUT_TOKENS = TextOperation.INPUT_TOKENS
OF_RESPONSES = frozenset({RESPONSES, INPUT_TOKENS})

IDENTIFIERS = frozenset({"metadata", "safety_identifier", "user"})
CACHE_HINTS = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})

HARMLESS: Mapping[TextOperation, frozenset[str]] = {
    CHAT: IDENTIFIERS | CACHE_HINTS | {"prediction", "service_tier", "session_id", "store"},
    COMPLETION: frozenset({"session_id", "user"}),
    RESPONSES: IDENTIFIERS
    | CACHE_HINTS
    | {"max_tool_calls", "service_tier", "session_id", "store", "stream_options"},
    MESSAGES: frozenset(
        {"cache_control", "metadata", "service_tier", "user_profile_id", "workspace_id"}
    ),
    TextOperation.COUNT_TOKENS: frozenset(
        {"cache_control", "metadata", "user_profile_id", "workspace_id"}
    ),
    TextOperation.EMBEDDINGS: frozenset({"user", *PROMPT_FIELDS}),
}
"""Fields without effect on vLLM's answer. They say who asks, or hint at how to serve it faster.
The model puts the prompt that a request names before its inputs.

The server keeps responses, not the model, so `store` has no effect here. `max_tool_calls` counts
hosted tools; there are none.
"""

ONLY_STANDARD = "only {} is served here"
NOT_HERE = "this server does not have it"
NOT_STORED = "responses are not kept (server.keep_responses); send the earlier items in 'input'"
MODEL_SAYS = "the options of the model say how it reads images"
VLLM_ONLY: Mapping[str, str] = {
    "chat_template": "the template is the model's own",
    "ec_transfer_params": NOT_HERE,
    "kv_transfer_params": NOT_HERE,
    "media_io_kwargs": MODEL_SAYS,
    "mm_processor_kwargs": MODEL_SAYS,
    "prompt_embeds": NOT_HERE,
    "watermarking": NOT_HERE,
}

OF_POOLING: Mapping[str, str] = {
    name: MODEL_SAYS for name in ("media_io_kwargs", "mm_processor_kwargs")
}

REFUSED: Mapping[TextOperation, Mapping[str, str]] = {
    CHAT: {
        **VLLM_ONLY,
        "audio": NOT_HERE,
        "function_call": "use 'tool_choice'",
        "functions": "use 'tools'",
        "modalities": ONLY_STANDARD.format("['text']"),
        "moderation": NOT_HERE,
        "verbosity": ONLY_STANDARD.format("'medium'"),
        "web_search_options": NOT_HERE,
    },
    COMPLETION: {**VLLM_ONLY, "best_of": "use 'n'"},
    RESPONSES: {
        **VLLM_ONLY,
        "background": NOT_HERE,
        "context_management": NOT_HERE,
        "conversation": NOT_STORED,
        "moderation": NOT_HERE,
        "previous_response_id": NOT_STORED,
        "prompt": "there are no stored prompts; use 'instructions' and 'input'",
    },
    MESSAGES: {
        **VLLM_ONLY,
        "compaction": NOT_HERE,
        "container": NOT_HERE,
        "context_management": NOT_HERE,
        "diagnostics": NOT_HERE,
        "inference_geo": NOT_HERE,
        "mcp_servers": NOT_HERE,
        "speed": ONLY_STANDARD.format("'standard'"),
        "thread": "messages are not stored; send all of them in 'messages'",
    },
    TextOperation.COUNT_TOKENS: {"speed": ONLY_STANDARD.format("'standard'")},
    TextOperation.EMBEDDINGS: OF_POOLING,
    TextOperation.TOKENIZE: OF_POOLING,
    TextOperation.RERANK: OF_POOLING,
    TextOperation.SCORE: OF_POOLING,
    TextOperation.CLASSIFY: {**OF_POOLING, "chat_template": VLLM_ONLY["chat_template"]},
}
"""Fields that ask for what this server does not have, and what to say of them."""

DETAILS: Mapping[str, Mapping[str, object]] = {
    "thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
}
"""What clients read of a refused field to go on without it. Anthropic's tool runner then sends the
whole history."""

NEUTRAL: Mapping[str, Collection[Any]] = {
    "background": (False,),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "speed": ("standard",),
    "verbosity": ("medium",),
    "watermarking": (False,),
}
"""Values of refused fields that ask for nothing. Null and what is empty are such values of any."""

TOOL_TYPES: Mapping[TextOperation, frozenset[str]] = {
    CHAT: frozenset({"function"}),
    RESPONSES: frozenset({"custom", "function", "namespace"}),
    MESSAGES: frozenset({"custom"}),
    TextOperation.COUNT_TOKENS: frozenset({"custom"}),
}
"""Types of tools that the client runs itself. There are no others here."""

CHOICE_TYPES: Mapping[TextOperation, frozenset[str]] = {
    CHAT: frozenset({"allowed_tools", "function"}),
    RESPONSES: frozenset({"allowed_tools", "custom", "function"}),
}

ENCODINGS = ("float", "base64")
"""Forms of an embedding that a JSON document holds. vLLM's others are no documents."""

INCLUDED = frozenset({"message.output_text.logprobs", "reasoning.encrypted_content"})
"""What a response may be asked to include. Thoughts are never encrypted, so the second has no
effect. The others belong to hosted tools."""

INPUT_TYPES = frozenset(
    {
        "custom_tool_call",
        "custom_tool_call_output",
        "function_call",
        "function_call_output",
        "message",
        "reasoning",
    }
)
"""Types of input items in the Responses API that mean something without hosted tools."""


def check_fields(
    operation: TextOperation, body: dict[str, Any], known: Collection[str]
) -> dict[str, Any]:
    """The body without its harmless fields. `known` are the fields of vLLM's schema.

    Raises:
        InvalidRequest: naming a field that is unknown, or asks for what is not here.

    """
    alike = RESPONSES if operation is INPUT_TOKENS else operation
    harmless = HARMLESS.get(alike, frozenset())
    refused = REFUSED.get(alike, {})
    for name, value in body.items():
        if name in refused:
            if value not in (None, "", [], {}) and value not in NEUTRAL.get(name, ()):
                raise _refusal(name, refused[name])
        elif name not in known and name not in harmless:
            raise InvalidRequest(f"Unknown parameter: {echoed(name)}.", param=name)
    _check_tools(alike, body)
    if operation in OF_RESPONSES:
        _check_response(body)
    if operation is TextOperation.EMBEDDINGS:
        encoding = body.get("encoding_format")
        if isinstance(encoding, str) and encoding not in ENCODINGS:
            raise _refusal("encoding_format", _only(encoding, ENCODINGS))
    gone = {name for name in body if name in refused or (name in harmless and name not in known)}
    return {name: value for name, value in body.items() if name not in gone}


def _check_tools(operation: TextOperation, body: Mapping[str, Any]) -> None:
    tools, choice = body.get("tools"), body.get("tool_choice")
    served = TOOL_TYPES.get(operation)
    if served is not None and isinstance(tools, list):
        for index, tool in enumerate(tools):
            kind = tool.get("type") if isinstance(tool, Mapping) else None
            if isinstance(kind, str) and kind not in served:
                raise _refusal(f"tools[{index}].type", _only(kind, served))
    served = CHOICE_TYPES.get(operation)
    if served is not None and isinstance(choice, Mapping):
        kind = choice.get("type")
        if isinstance(kind, str) and kind not in served:
            raise _refusal("tool_choice.type", _only(kind, served))


def _check_response(body: Mapping[str, Any]) -> None:
    text, items = body.get("text"), body.get("input")
    verbosity = text.get("verbosity") if isinstance(text, Mapping) else None
    if verbosity not in (None, "medium"):
        raise _refusal("text.verbosity", ONLY_STANDARD.format("'medium'"))
    include = body.get("include")
    for index, each in enumerate(include if isinstance(include, list) else ()):
        if isinstance(each, str) and each not in INCLUDED:
            raise _refusal(f"include[{index}]", _only(each, INCLUDED))
    for index, item in enumerate(items if isinstance(items, list) else ()):
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "item_reference":
            raise _refusal(f"input[{index}].type", NOT_STORED)
        if isinstance(kind, str) and kind not in INPUT_TYPES:
            raise _refusal(f"input[{index}].type", _only(kind, INPUT_TYPES))


def _only(kind: str, served: Collection[str]) -> str:
    return f"{echoed(kind)} is not served here, only {', '.join(sorted(served))}"


def _refusal(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {reason}.", param=param, details=DETAILS.get(param))
