"""Items of the type `compaction`: a summary in place of the turns before it.

Such an item is opaque to its client, as OpenAI's is. It is not secret: it says no more than the
turns that the client had itself.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

from server.responses.ids import new_item_id

MARK = "rh1."
"""Begins the content of our own items. Those of a provider go on to it as they are."""

MAX_BYTES = 4 * 2**20
"""Of a summary. A short item could otherwise become one that fills the memory."""

TASK = (
    "Summarise the conversation so far, for whoever goes on with it. Keep every fact, name, number,"
    " decision, result of a tool and open question. Write the summary alone."
)
"""What the model is asked at the end of the conversation."""

_HEADING = "Summary of the conversation so far:\n\n"


def compaction_item(summary: str) -> dict[str, Any]:
    """The item that stands for what `summary` says."""
    content = MARK + base64.urlsafe_b64encode(zlib.compress(summary.encode())).decode()
    item = {"type": "compaction", "encrypted_content": content}
    return {"id": new_item_id(item), **item}


def summary_of(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """The message that one of our own items stands for; None for any other item."""
    content = item.get("encrypted_content")
    if item.get("type") != "compaction" or not isinstance(content, str):
        return None
    if not content.startswith(MARK):
        return None
    try:
        packed = base64.urlsafe_b64decode(content.removeprefix(MARK))
        unpacking = zlib.decompressobj()
        raw = unpacking.decompress(packed, MAX_BYTES)
        if not unpacking.eof:
            return None
        summary = raw.decode()
    except (ValueError, binascii.Error, zlib.error):
        return None
    return {"type": "message", "role": "user", "content": _HEADING + summary}
