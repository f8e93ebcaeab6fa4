"""The items of a turn: as they are kept, and as a model gets them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.words import echoed
from server.responses.compaction import summary_of
from server.responses.ids import new_item_id

Item = dict[str, Any]

REFERENCE = "item_reference"
ROLES = ("user", "assistant", "system", "developer")
TYPES = frozenset(
    {
        "compaction",
        "custom_tool_call",
        "custom_tool_call_output",
        "file_search_call",
        "function_call",
        "function_call_output",
        "message",
        "reasoning",
    }
)
"""Types of items that a conversation may be given. All others belong to tools that are not here."""

PARTS: Mapping[str, str | None] = {
    "input_file": None,
    "input_image": None,
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
    "summary_text": "text",
    "text": "text",
}
"""Types of the parts of a message, each with the text that it must have."""

CALLS = frozenset({"custom_tool_call", "function_call"})
OUTPUTS = frozenset({"custom_tool_call_output", "function_call_output"})

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "compaction": ("encrypted_content",),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "file_search_call": ("id", "queries", "status"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "message": ("role", "content"),
    "reasoning": ("summary",),
}
_ENDED = ("completed", "incomplete")


def kind_of(item: Any) -> str:
    """The type of an item. A message may leave it out, and so may a reference."""
    if not isinstance(item, Mapping):
        return ""
    kind = item.get("type")
    if kind is not None:
        return kind if isinstance(kind, str) else ""
    return "message" if "role" in item else REFERENCE if item.keys() == {"id"} else ""


def as_items(given: Any) -> list[Any]:
    """The `input` of a request as a list. A text is a message of the user."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return list(given) if isinstance(given, list) else []


def kept_item(item: Mapping[str, Any]) -> Item:
    """The item as it is kept: with an id, a type, a status, and the parts of its content."""
    kind = kind_of(item)
    kept: Item = {**item, "type": kind or item.get("type")}
    if not isinstance(kept.get("id"), str) or not kept["id"]:
        kept["id"] = new_item_id(kept)
    if kind == "message":
        content = kept.get("content")
        said = kept.get("role") == "assistant"
        if isinstance(content, str):
            part: Item = {"type": "output_text" if said else "input_text", "text": content}
            content = [part]
        if isinstance(content, list):
            kept["content"] = [_kept_part(each) for each in content]
    if kind in ("message", *CALLS, *OUTPUTS) and kept.get("status") not in _ENDED:
        kept["status"] = "completed"
    return kept


def _kept_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "output_text":
        return {"annotations": [], "logprobs": [], **part}
    if kind == "input_image":
        return {"detail": "auto", **part}
    return part


def for_model(items: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Kept items as the input of a model: without what a cut answer left, and without nulls.

    A call that was cut cannot be read, and nobody has run it.
    """
    found = []
    for item in items:
        if item.get("type") in CALLS and not _is_whole(item):
            continue
        found.append(expanded({name: each for name, each in item.items() if each is not None}))
    return [_without_status(item) for item in found]


def expanded(item: Any) -> Any:
    """The item, or the message that a compaction of ours stands for."""
    return (summary_of(item) if isinstance(item, Mapping) else None) or item


def _is_whole(item: Mapping[str, Any]) -> bool:
    if item.get("status") == "incomplete" or item.get("type") != "function_call":
        return item.get("status") != "incomplete"
    try:
        json.loads(item.get("arguments") or "{}")
    except (TypeError, ValueError):
        return False
    return True


def _without_status(item: Item) -> Item:
    if item.get("type") == "message" and item.get("role") != "assistant":
        return {name: item[name] for name in ("type", "role", "content") if name in item}
    if item.get("type") in OUTPUTS:
        return {name: item[name] for name in ("type", "call_id", "output") if name in item}
    # A model would go on with a text that was cut, where it is the last item.
    return {**item, "status": "completed"} if item.get("status") == "incomplete" else item


def check_answered(history: Sequence[Item], own: Sequence[Any]) -> None:
    """Refuse a turn that leaves a call of an earlier turn without its output, as OpenAI does.

    Raises:
        InvalidRequest: naming the call.

    """
    every = [*history, *(item for item in own if isinstance(item, Mapping))]
    outputs = [item.get("call_id") for item in every if kind_of(item) in OUTPUTS]
    answered = {each for each in outputs if isinstance(each, str)}
    for item in history:
        if item.get("type") in CALLS and item.get("call_id") not in answered:
            raise InvalidRequest(
                f"No tool output found for function call {echoed(item.get('call_id'))}.",
                param="input",
            )


def check_item(item: Any, place: str) -> None:
    """Check an item that no model will.

    Raises:
        InvalidRequest: naming the item, which stands at `place`, and its field.

    """
    if not isinstance(item, Mapping):
        raise _wrong(place, "an item is an object")
    kind = kind_of(item)
    if kind not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise _wrong(
            f"{place}.type", f"{echoed(item.get('type'))} is not served here, only {known}"
        )
    for name in _REQUIRED[kind]:
        if item.get(name) is None:
            raise _wrong(f"{place}.{name}", "the field is required")
    for name in ("id", "call_id", "name", "arguments", "encrypted_content"):
        if item.get(name) is not None and not isinstance(item[name], str):
            raise _wrong(f"{place}.{name}", "it is a text")
    if kind == "message":
        _check_message(item, place)
    for name in ("queries", "results", "summary"):
        if item.get(name) is not None and not isinstance(item[name], list):
            raise _wrong(f"{place}.{name}", "it is a list")


def _check_message(item: Mapping[str, Any], place: str) -> None:
    if item["role"] not in ROLES:
        known = ", ".join(ROLES)
        raise _wrong(f"{place}.role", f"{echoed(item['role'])} is none of {known}")
    content = item["content"]
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _wrong(f"{place}.content", "it is a text or a list of parts")
    for index, part in enumerate(content):
        _check_part(part, f"{place}.content[{index}]")


def _check_part(part: Any, place: str) -> None:
    """Check a part of a message, so that no later turn of the conversation fails by it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise _wrong(f"{place}.type", "the field is required, a text")
    if kind not in PARTS:
        raise _wrong(f"{place}.type", f"{echoed(kind)} is none of {', '.join(sorted(PARTS))}")
    field = PARTS[kind]
    if field is not None and not isinstance(part.get(field), str):
        raise _wrong(f"{place}.{field}", "the field is required, a text")
    for name in ("image_url", "file_id", "file_url", "file_data", "filename", "detail"):
        if part.get(name) is not None and not isinstance(part[name], str):
            raise _wrong(f"{place}.{name}", "it is a text")


def _wrong(param: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {rule}.", param=param)
