"""The fields of a request by which this server keeps a response, or goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from server.responses.items import as_items

OURS = ("background", "conversation", "previous_response_id", "store")

ECHOED = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
"""Fields without effect on a model's answer, which the response repeats."""

MAX_METADATA = 16
MAX_KEY = 64
MAX_VALUE = 512


@dataclass(frozen=True, slots=True)
class KeepingFields:
    """They are of the server alone: no model sees them."""

    store: bool
    background: bool
    previous: str | None
    conversation: str | None
    metadata: dict[str, str]


def keeping_fields(body: Mapping[str, Any]) -> KeepingFields:
    """Check the fields.

    Raises:
        InvalidRequest: naming the wrong field.

    """
    store, background = _flag(body, "store", default=True), _flag(body, "background", default=False)
    previous = body.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        raise InvalidRequest(
            "previous_response_id: it is the id of a response.", param="previous_response_id"
        )
    conversation = _conversation(body.get("conversation"))
    if previous is not None and conversation is not None:
        raise InvalidRequest(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation'. Ensure you"
            " are only providing one of them.",
            param="previous_response_id",
        )
    if background and not store:
        raise InvalidRequest(
            "background: a response that is made in the background is kept; leave out 'store'.",
            param="background",
        )
    return KeepingFields(store, background, previous, conversation, metadata_of(body))


def metadata_of(body: Mapping[str, Any]) -> dict[str, str]:
    """The field `metadata`, as OpenAI bounds it.

    Raises:
        InvalidRequest: it is something else.

    """
    metadata = body.get("metadata")
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or len(metadata) > MAX_METADATA:
        raise InvalidRequest(
            f"metadata: it is an object of at most {MAX_METADATA} pairs.", param="metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_KEY or not isinstance(value, str) or len(value) > MAX_VALUE:
            raise InvalidRequest(
                f"metadata: a key has at most {MAX_KEY} characters, and a value is a text of at"
                f" most {MAX_VALUE}.",
                param="metadata",
            )
    return dict(metadata)


def input_of(body: Mapping[str, Any]) -> list[Any]:
    """The items of the turn itself.

    Raises:
        InvalidRequest: the input is neither a text nor a list.

    """
    given = body.get("input")
    if given is not None and not isinstance(given, str | list):
        raise InvalidRequest("input: it is a text, or a list of items.", param="input")
    return as_items(given)


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: it is true or false.", param=name)
    return value


def _conversation(value: Any) -> str | None:
    if value is None:
        return None
    named = value.get("id") if isinstance(value, Mapping) and value.keys() <= {"id"} else value
    if not isinstance(named, str) or not named:
        raise InvalidRequest(
            "conversation: it is the id of a conversation, or an object with that id.",
            param="conversation",
        )
    return named
