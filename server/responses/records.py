"""What is kept of a response and of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.responses.items import Item

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, INCOMPLETE = "completed", "incomplete"
FAILED, CANCELLED = "failed", "cancelled"

UNFINISHED = (QUEUED, IN_PROGRESS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A response without its items."""

    id: str
    owner: str
    """The name of the key; empty without keys."""
    thread: str
    """The id of the conversation, or of the first response of the chain. It leaves as a whole."""
    document: dict[str, Any]
    """OpenAI's, without the output."""
    created_at: int
    previous: str | None = None
    conversation: str | None = None
    seen: int = 0
    """The last item of the conversation when the turn began."""
    background: bool = False
    job: dict[str, Any] | None = None
    """The request, while it is to be run in the background."""
    attempts: int = 0
    """How many runs began."""

    @property
    def status(self) -> str:
        """OpenAI's: queued, in_progress, completed, incomplete, failed or cancelled."""
        return str(self.document["status"])


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its items."""

    id: str
    owner: str
    created_at: int
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page:
    """Some items of a list, and whether there are more."""

    items: list[Item]
    has_more: bool
