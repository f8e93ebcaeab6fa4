"""The events of a streamed response, as they pass: which of them tell of the whole response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from server.responses.items import Item

END = b"\n\n"

ENDED = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}
)
"""Types of the last event of a response."""
WHOLE = ENDED | {"response.created", "response.in_progress", "response.queued"}
"""Types of events that have the whole response."""

_ADDED, _DONE = "response.output_item.added", "response.output_item.done"
_TEXT = "response.output_text.delta"


def blocks_of(piece: bytes) -> Iterator[bytes]:
    """The events and comments of a piece of a stream, each with the empty line that ends it."""
    for block in piece.split(END):
        if block:
            yield block + END


def type_of(block: bytes) -> str:
    """The type of an event; empty for a comment."""
    for line in block.splitlines():
        if line.startswith(b"event:"):
            return line.removeprefix(b"event:").strip().decode(errors="replace")
        if line.startswith(b"data:"):
            kind = (document_of(block) or {}).get("type")
            return kind if isinstance(kind, str) else ""
    return ""


def document_of(block: bytes) -> dict[str, Any] | None:
    """The data of an event as a JSON object; None if it has none."""
    lines = (line for line in block.splitlines() if line.startswith(b"data:"))
    data = b"\n".join(line.removeprefix(b"data:").removeprefix(b" ") for line in lines)
    try:
        document = json.loads(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def event_block(block: bytes, document: dict[str, Any]) -> bytes:
    """The event with another document. Its other lines stay."""
    others = [line for line in block.splitlines() if line and not line.startswith(b"data:")]
    # What came in escapes stays so: some readers take U+2028 for the end of a line.
    text = json.dumps(document, ensure_ascii=block.isascii(), separators=(",", ":"))
    data = b"data: " + text.encode("utf-8", "surrogatepass")
    return b"\n".join([*others, data]) + END


@dataclass(slots=True)
class Written:
    """What a stream has given so far: for a response that its client leaves."""

    document: dict[str, Any] | None = None
    """The response as the last event told it."""
    items: list[Item] = field(default_factory=list)
    _since: list[bytes] = field(default_factory=list)
    """The events of the item that is being written. They are read only if they are needed."""

    def take(self, kind: str, block: bytes) -> None:
        """Note an event."""
        if kind == _DONE:
            item = (document_of(block) or {}).get("item")
            if isinstance(item, dict):
                self.items.append(item)
            self._since.clear()
        elif kind in (_ADDED, _TEXT):
            self._since.append(block)

    def output(self) -> list[Item]:
        """The items, and the text of the one that was cut."""
        begun: Item | None = None
        text: list[str] = []
        for block in self._since:
            event = document_of(block) or {}
            if event.get("type") == _ADDED and isinstance(event.get("item"), dict):
                begun, text = event["item"], []
            elif isinstance(event.get("delta"), str):
                text.append(event["delta"])
        if begun is None or begun.get("type") != "message" or not text:
            return self.items
        part = {"type": "output_text", "text": "".join(text), "annotations": [], "logprobs": []}
        return [*self.items, {**begun, "status": "incomplete", "content": [part]}]
