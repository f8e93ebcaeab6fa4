"""A batch that has not ended, as the process holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

from server.batches.line_call import LineAnswer
from server.batches.record import Batch, BatchState


@dataclass(slots=True, eq=False)
class LiveBatch:
    """A batch that has not ended."""

    batch: Batch
    """As its record is."""
    running: int = 0
    """Lines that run now."""
    ends_as: BatchState | None = None
    """No further line begins: it is cancelled or expired once the running lines have ended."""
    closing: bool = False
    """Its result files are being written."""
    input: BinaryIO | None = None
    failed_loads: dict[str, int] = field(default_factory=dict)
    """By group, how often in a row its model could not be loaded."""
    broken: dict[str, LineAnswer] = field(default_factory=dict)
    """By group, the answer of a load that failed too often: the other lines get it too."""

    @property
    def begins_lines(self) -> bool:
        """Whether lines may begin."""
        return self.batch.state is BatchState.IN_PROGRESS and self.ends_as is None

    def take(self, batch: Batch) -> None:
        """Take a newer record. Threads write them, and may report them in another order."""
        if batch.completed + batch.failed >= self.batch.completed + self.batch.failed:
            self.batch = batch
