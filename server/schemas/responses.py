"""The bodies and queries of kept responses and conversations."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, Field

from engine.errors import InvalidRequest
from engine.words import echoed
from server.forms import Fields
from server.responses.fields import MAX_METADATA
from server.responses.items import check_item
from server.schemas.fields import Body

MAX_ITEMS = 20
"""Items that one request may add to a conversation. OpenAI's limit."""

INCLUDED = ("file_search_call.results", "message.input_image.image_url",
            "message.output_text.logprobs", "reasoning.encrypted_content")  # fmt: skip
"""What items may be asked to include. They have it if the model gave it."""

_LISTED = re.compile(r"include(\[\d*\])?")


def _check_included(value: list[str]) -> list[str]:
    for each in value:
        if each not in INCLUDED:
            raise ValueError(f"{echoed(each)} is not served here, only {', '.join(INCLUDED)}")
    return value


Include = Annotated[list[str], AfterValidator(_check_included)]
Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA)]


class ResponseQuery(Body):
    """`GET /v1/responses/{response_id}`."""

    include: Include = Field(default_factory=list)
    stream: bool = False
    """Send the events of a response that was made with `background` and `stream`."""
    starting_after: int | None = Field(default=None, ge=0, lt=2**31)
    """The number of the event before the first one."""
    include_obfuscation: bool = False
    """Without effect: no event is padded."""


class ItemsQuery(Body):
    """A list of items: those of a conversation, or those that a response was made from."""

    limit: int = Field(default=20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    """The id of the item before the first one."""
    include: Include = Field(default_factory=list)


class IncludeQuery(Body):
    """What one item, or those that are added, are to include."""

    include: Include = Field(default_factory=list)


class ConversationBody(Body):
    """`POST /v1/conversations`."""

    items: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_ITEMS)
    metadata: Metadata | None = None

    def checked_items(self) -> list[dict[str, Any]]:
        """The items.

        Raises:
            InvalidRequest: naming the wrong field of one.

        """
        return checked(self.items or [])


class MetadataBody(Body):
    """`POST /v1/conversations/{conversation_id}`."""

    metadata: Metadata


class ItemsBody(Body):
    """`POST /v1/conversations/{conversation_id}/items`."""

    items: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_ITEMS)

    def checked_items(self) -> list[dict[str, Any]]:
        """The items.

        Raises:
            InvalidRequest: naming the wrong field of one.

        """
        return checked(self.items)


class CompactBody(Body):
    """`POST /v1/responses/compact`."""

    model: str = Field(min_length=1)
    input: str | list[Any] | None = None
    previous_response_id: str | None = None
    instructions: str | None = None
    prompt_cache_key: str | None = None
    """Without effect, as are the next three."""
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None


def checked(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client adds to a conversation.

    Raises:
        InvalidRequest: naming the wrong field of one, or an id that is there twice.

    """
    for index, item in enumerate(items):
        check_item(item, f"items[{index}]")
    ids = [item["id"] for item in items if item.get("id")]
    if len(set(ids)) < len(ids):
        raise InvalidRequest("items: two of them have the same id.", param="items")
    return items


def query_with_include(request: Request) -> Fields:
    """The fields of the query. `include` is a list, in any of the ways that clients write it."""
    values: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if _LISTED.fullmatch(name):
            values.setdefault("include", []).append(value)
        else:
            values[name] = value
    return Fields(values, typed=False)
