"""What a text request holds beside its texts: pictures, sound, video, files.

Each interface writes them in its own way. `attachments` finds all of them, and where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

ROOTS = (
    "messages",
    "input",
    "system",
    "prompt",
    *("query", "queries", "documents", "items", "text_1", "text_2", "data_1", "data_2"),
)
"""The fields of a request that may hold parts of content."""


class Kind(StrEnum):
    """What an attachment is, in the words of an error."""

    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    FILE = "file"
    TENSOR = "embeddings"
    """Numbers in place of what a model would compute. No request may bring them."""


_OF_TYPE: Mapping[str, tuple[Kind, str]] = {
    "image_url": (Kind.IMAGE, "image_url"),
    "input_image": (Kind.IMAGE, "image_url"),
    "image": (Kind.IMAGE, "source"),
    "input_audio": (Kind.AUDIO, "input_audio"),
    "audio_url": (Kind.AUDIO, "audio_url"),
    "video_url": (Kind.VIDEO, "video_url"),
    "file": (Kind.FILE, "file"),
    "input_file": (Kind.FILE, "type"),
    "document": (Kind.FILE, "source"),
    "container_upload": (Kind.FILE, "type"),
    "image_pil": (Kind.TENSOR, "image_pil"),
    "image_embeds": (Kind.TENSOR, "image_embeds"),
    "audio_embeds": (Kind.TENSOR, "audio_embeds"),
    "video_embeds": (Kind.TENSOR, "video_embeds"),
    "prompt_embeds": (Kind.TENSOR, "data"),
}
"""Kind, and the field with the content, by the `type` of a part: OpenAI's, Anthropic's, vLLM's."""

_OF_FIELD: Mapping[str, Kind] = {
    "image_url": Kind.IMAGE,
    "input_audio": Kind.AUDIO,
    "audio_url": Kind.AUDIO,
    "video_url": Kind.VIDEO,
    "image_pil": Kind.TENSOR,
    "image_embeds": Kind.TENSOR,
    "audio_embeds": Kind.TENSOR,
    "video_embeds": Kind.TENSOR,
    "prompt_embeds": Kind.TENSOR,
}
"""vLLM takes parts without a `type`, by these fields."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """One part of a request's content that is not text."""

    kind: Kind
    param: str
    """The path of the field with the content."""
    part: dict[str, Any]
    """The part itself, as it stands in the body."""
    field: str
    """The name of the field with the content."""
    place: str
    """The path of the part."""


def attachments(body: Mapping[str, Any]) -> Iterator[Attachment]:
    """All of them, in the order of the body. The parser of JSON has bounded its depth."""
    for root in ROOTS:
        value = body.get(root)
        if isinstance(value, list | dict):
            yield from _below(value, root)


def _below(node: Any, place: str) -> Iterator[Attachment]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            if isinstance(item, dict | list):
                yield from _below(item, f"{place}[{index}]")
        return
    found = _read(node, place)
    if found is not None:
        yield found
        return
    for key, value in node.items():
        # A model made up the arguments of a tool call. They are shown to it, never opened.
        if key == "input" and node.get("type") == "tool_use":
            continue
        if isinstance(value, dict | list):
            yield from _below(value, f"{place}.{key}")


def _read(part: dict[str, Any], place: str) -> Attachment | None:
    kind = part.get("type")
    if isinstance(kind, str):
        known = _OF_TYPE.get(kind)
        if known is None:
            return None
        return Attachment(known[0], f"{place}.{known[1]}", part, known[1], place)
    for field, found in _OF_FIELD.items():
        if field in part:
            return Attachment(found, f"{place}.{field}", part, field, place)
    return None
