"""What is known of vector stores, of their files, and of batches of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from server.vector_stores.chunking import Chunking
from server.vector_stores.filters import Attributes

DAY_S = 86_400


class AttachmentStatus(StrEnum):
    """Where a file of a store is; the last three are final."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Counts:
    """The files of a store or a batch."""

    by_status: Mapping[AttachmentStatus, int] = field(default_factory=dict)
    nbytes: int = 0

    def of(self, status: AttachmentStatus) -> int:
        """How many are in this state."""
        return self.by_status.get(status, 0)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.by_status.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorStore:
    """One vector store. Times are Unix seconds."""

    id: str
    """`vs_` and 32 hexadecimal digits."""
    owner: str
    """The name of the key that it belongs to; empty without keys."""
    name: str
    description: str | None
    model: str
    """The id of the embedding model that it was made with."""
    created_at: int
    last_active_at: int
    expires_days: int | None
    metadata: Mapping[str, str] | None

    @property
    def expires_at(self) -> int | None:
        """When it expires, unless it is used before."""
        if self.expires_days is None:
            return None
        return self.last_active_at + self.expires_days * DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A file of a store."""

    number: int
    store: str
    file: str
    filename: str
    batch: str | None
    caller: str
    """The name of the key that attached it, which pays for the vectors."""
    status: AttachmentStatus
    error: tuple[str, str] | None
    """OpenAI's code, and a message."""
    chunking: Chunking
    attributes: Attributes
    nbytes: int
    """Of its passages and vectors."""
    created_at: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that is to be attached."""

    file: str
    filename: str
    chunking: Chunking
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class FileBatch:
    """Files that were attached together."""

    id: str
    store: str
    created_at: int
    cancelled: bool
