"""The items of a realtime conversation, and the chat messages that they are."""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from server.schemas.realtime import MAX_CONTENT, MAX_TEXT_CHARS

MAX_ITEMS = 10_000
MAX_BYTES = 64 * 2**20
"""Of the JSON of all items that a client may send: four of the largest messages."""
MAX_CALL_ID_CHARS = 256

_ROLES = {"user": ("input_text", "input_audio", "input_image"), "system": ("input_text",)}
_ASSISTANT = ("output_text", "output_audio")


def new_id(prefix: str) -> str:
    """An id such as `item_3f2a…`."""
    return f"{prefix}_{uuid.uuid4().hex[:21]}"


@dataclass(frozen=True, slots=True)
class SpokenClause:
    """A part of an answer, and where its audio ends."""

    text: str
    end_ms: float


@dataclass(eq=False, slots=True)
class Item:
    """A message, a call of a function, or its output."""

    document: dict[str, Any]
    """As the client sees it, without audio."""
    transcript: asyncio.Task[str] | None = None
    """What was said, once it is known. The content has it then."""
    spoken: list[SpokenClause] = field(default_factory=list)
    """Of an answer that was spoken."""
    heard_ms: float = math.inf
    """How much of it was heard, if that is known."""
    nbytes: int = 0
    """Of its JSON, if the client sent it."""

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.document["id"])

    def cut(self, audio_end_ms: float) -> str:
        """Keep what was said until then, and return it. What an earlier call cut stays away.

        Of the clause in which that time lies, words are kept in proportion to its audio.
        """
        # A client may say what it heard before a response that it interrupts has ended.
        audio_end_ms = self.heard_ms = min(self.heard_ms, audio_end_ms)
        kept: list[str] = []
        begin_ms = 0.0
        for clause in self.spoken:
            if clause.end_ms <= audio_end_ms:
                kept.append(clause.text)
            else:
                words = clause.text.split()
                share = (audio_end_ms - begin_ms) / max(clause.end_ms - begin_ms, 1e-3)
                kept.append(" ".join(words[: round(len(words) * max(0.0, share))]))
                break
            begin_ms = clause.end_ms
        text = " ".join(part.strip() for part in kept if part.strip())
        for part in self.document.get("content", ()):
            if part["type"] == "output_audio":
                part["transcript"] = text
        return text


class Conversation:
    """All items, in order."""

    def __init__(self) -> None:
        self.id = new_id("conv")
        self.items: list[Item] = []

    @property
    def last_id(self) -> str | None:
        """The id of the last item; None: there is none."""
        return self.items[-1].id if self.items else None

    def find(self, item_id: Any, param: str = "item_id") -> Item:
        """The item of that id.

        Raises:
            InvalidRequest: there is none.

        """
        for item in self.items:
            if item.id == item_id:
                return item
        raise InvalidRequest("There is no item with this id in the conversation.", param=param)

    def check_room(self, item: Item) -> None:
        """Count an item that the client sends.

        Raises:
            InvalidRequest: all items together would be too large.

        """
        item.nbytes = len(json.dumps(item.document))
        if sum(each.nbytes for each in (*self.items, item)) > MAX_BYTES:
            raise InvalidRequest(
                f"The items of a conversation have {MAX_BYTES // 2**20} MiB of JSON at most.",
                param="item",
            )

    def add(self, item: Item, previous_item_id: str | None = None) -> str | None:
        """Put an item at the end, or behind another. Returns the id of the one before it.

        `previous_item_id` may be `root`, which is the beginning.

        Raises:
            InvalidRequest: there is no such item, the id is taken, or there are too many.

        """
        if len(self.items) >= MAX_ITEMS:
            raise InvalidRequest(f"A conversation has {MAX_ITEMS} items at most.", param="item")
        if any(each.id == item.id for each in self.items):
            raise InvalidRequest("An item of the conversation has this id.", param="item.id")
        if previous_item_id is None:
            self.items.append(item)
        elif previous_item_id == "root":
            self.items.insert(0, item)
        else:
            before = self.find(previous_item_id, "previous_item_id")
            self.items.insert(self.items.index(before) + 1, item)
        place = self.items.index(item)
        return self.items[place - 1].id if place else None

    def remove(self, item_id: Any) -> None:
        """Take an item out.

        Raises:
            InvalidRequest: there is none of that id.

        """
        item = self.find(item_id)
        if item.transcript is not None:
            item.transcript.cancel()
        self.items.remove(item)

    async def known(self) -> None:
        """Wait until all that was said is transcribed, or has failed."""
        waits = [item.transcript for item in self.items if item.transcript is not None]
        if waits:
            await asyncio.wait(waits)


def read_item(document: Any, param: str = "item") -> Item:
    """An item as a client sends it.

    Audio is not among what an item of a client may hold: it comes through the buffer.

    Raises:
        InvalidRequest: naming the wrong field.

    """
    if not isinstance(document, Mapping):
        raise InvalidRequest("An item is an object.", param=param)
    kind = document.get("type")
    given_id = document.get("id")
    if given_id is not None and not _is_id(given_id):
        raise InvalidRequest("An id has 1 to 64 characters.", param=f"{param}.id")
    head = {"id": given_id or new_id("item"), "object": "realtime.item", "type": kind}
    if kind == "message":
        return Item({**head, "status": "completed", **_message(document, param)})
    if kind == "function_call":
        call = {name: _text(document, name, param) for name in ("call_id", "name", "arguments")}
        return Item({**head, "status": "completed", **call})
    if kind == "function_call_output":
        call = {name: _text(document, name, param) for name in ("call_id", "output")}
        return Item({**head, "status": "completed", **call})
    raise InvalidRequest(
        "An item is a message, a function_call or a function_call_output.", param=f"{param}.type"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 64


def _text(document: Mapping[str, Any], name: str, param: str) -> str:
    value = document.get(name)
    if name == "call_id" and (not isinstance(value, str) or len(value) > MAX_CALL_ID_CHARS):
        raise InvalidRequest("A call has an id, a short text.", param=f"{param}.{name}")
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise InvalidRequest(
            f"It is a text of at most {MAX_TEXT_CHARS} characters.", param=f"{param}.{name}"
        )
    return value


def _message(document: Mapping[str, Any], param: str) -> dict[str, Any]:
    role = document.get("role")
    allowed = _ASSISTANT if role == "assistant" else _ROLES.get(str(role))
    if allowed is None:
        raise InvalidRequest("A role is user, assistant or system.", param=f"{param}.role")
    content = document.get("content")
    if not isinstance(content, list) or len(content) > MAX_CONTENT:
        raise InvalidRequest(
            f"The content is a list of at most {MAX_CONTENT} parts.", param=f"{param}.content"
        )
    parts = [_part(part, allowed, f"{param}.content[{n}]") for n, part in enumerate(content)]
    return {"role": role, "content": parts}


def _part(part: Any, allowed: Sequence[str], param: str) -> dict[str, Any]:
    if not isinstance(part, Mapping) or part.get("type", allowed[0]) not in allowed:
        raise InvalidRequest(
            f"A part of this message is one of {', '.join(allowed)}.", param=f"{param}.type"
        )
    kind = str(part.get("type", allowed[0]))
    if kind == "input_image":
        url = part.get("image_url")
        if not isinstance(url, str) or not url.startswith("data:"):
            raise InvalidRequest("An image is a data: URL.", param=f"{param}.image_url")
        return {"type": kind, "image_url": url}
    if kind in ("input_audio", "output_audio"):
        if part.get("audio") is not None:
            raise InvalidRequest(
                "Audio comes by input_audio_buffer.append; an item may have a transcript.",
                param=f"{param}.audio",
            )
        return {"type": kind, "transcript": _text(part, "transcript", param)}
    return {"type": kind, "text": _text(part, "text", param)}


def messages(items: Iterable[Item], instructions: str) -> list[dict[str, Any]]:
    """The items as messages of a chat, after the instructions."""
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    for item in items:
        for message in _messages_of(item.document):
            last = found[-1] if found else None
            if last is not None and "tool_calls" in message and "tool_calls" in last:
                last["tool_calls"] += message["tool_calls"]
            else:
                found.append(message)
    return found


def _messages_of(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    match document["type"]:
        case "message":
            content = _content(document["content"])
            if content:
                yield {"role": document["role"], "content": content}
        case "function_call":
            function = {"name": document["name"], "arguments": document["arguments"]}
            call = {"id": document["call_id"], "type": "function", "function": function}
            yield {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            yield {
                "role": "tool",
                "tool_call_id": document["call_id"],
                "content": document["output"],
            }


def _content(parts: Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    if all(part["type"] != "input_image" for part in parts):
        texts = [part.get("text") or part.get("transcript") or "" for part in parts]
        return "\n".join(text for text in texts if text)
    mixed: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "input_image":
            mixed.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            mixed.append({"type": "text", "text": part.get("text") or part.get("transcript") or ""})
    return mixed
