"""What is known of a batch, and of each of its lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class BatchState(StrEnum):
    """Where a batch is; the last four are final."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the batch has ended."""
        return self in FINAL


FINAL = frozenset(
    {BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED}
)


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line of the input, or with the file itself."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """The number of the line; the first is 1."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What lines took, in tokens."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch as it is now. Times are Unix seconds."""

    id: str
    """`batch_` and 32 hexadecimal digits."""
    owner: str
    """The name of the key that made it; empty without keys."""
    endpoint: str
    input_file_id: str
    completion_window: str
    """As the client gave it."""
    metadata: Mapping[str, str] | None
    state: BatchState
    created_at: int
    expires_at: int
    """When the lines that are left are given up."""
    output_expires_s: int | None = None
    """How long the results are kept; None takes the server's own limit."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    total: int = 0
    """Lines; 0 until they are validated."""
    completed: int = 0
    failed: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    sequence: int = 0
    """Of its record, in order of creation."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch: where it is in the input, and what it needs."""

    batch: int
    """The sequence of its batch."""
    number: int
    """The first line is 1."""
    custom_id: str
    group: str
    """The id of the model, or the name of the route: lines of one group run one after another."""
    offset: int
    nbytes: int
    attempts: int = 0
    """How often it was begun by processes that did not live to see its end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a line ended."""

    ok: bool
    result: bytes
    """Its line of the output or error file, with the line feed."""
    tokens: Tokens = field(default_factory=Tokens)
