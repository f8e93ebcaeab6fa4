"""The ids of responses, conversations and items: OpenAI's prefixes, and 192 random bits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

RANDOM_BYTES = 24

RESPONSE = "resp"
CONVERSATION = "conv"

_OF_ITEMS: Mapping[str, str] = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "compaction": "cmp",
    "file_search_call": "fs",
}


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(RANDOM_BYTES)}"


def new_item_id(item: Mapping[str, Any]) -> str:
    """An id for an item of this type."""
    return new_id(_OF_ITEMS.get(str(item.get("type")), "item"))
