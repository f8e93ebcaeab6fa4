"""The errors of kept responses, with the codes that OpenAI's clients know."""

from __future__ import annotations

from engine.errors import InvalidRequest, NotFound
from engine.words import echoed

_LOCKED = (
    "Another process is currently operating on this conversation. Please retry in a few seconds."
)


class PreviousResponseNotFound(InvalidRequest):
    """The caller has no response of that id."""

    code = "previous_response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Previous response with id {echoed(response_id)} not found.",
            param="previous_response_id",
        )


class ConversationLocked(InvalidRequest):
    """Another turn of the conversation runs. Clients try again after a while."""

    code = "conversation_locked"

    def __init__(self, message: str = _LOCKED) -> None:
        super().__init__(message, param="conversation")


def no_response(response_id: str) -> NotFound:
    """The caller has no response of that id."""
    return NotFound(f"Response with id {echoed(response_id)} not found.", param="response_id")


def no_conversation(conversation_id: str, param: str = "conversation_id") -> NotFound:
    """The caller has no conversation of that id."""
    return NotFound(f"Conversation with id {echoed(conversation_id)} not found.", param=param)


def no_item(item_id: str, param: str = "item_id") -> NotFound:
    """There is no item of that id, or the caller may not read it."""
    return NotFound(f"Item with id {echoed(item_id)} not found.", param=param)
