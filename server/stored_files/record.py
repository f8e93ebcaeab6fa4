"""What is known of a stored file, and whose files somebody sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from server.keys.access import access_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from server.settings import ServerSettings


class Purpose(StrEnum):
    """What a file is for. Clients give the first six; the others are results."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"
    ASSISTANTS_OUTPUT = "assistants_output"
    BATCH_OUTPUT = "batch_output"
    FINE_TUNE_RESULTS = "fine-tune-results"


@dataclass(frozen=True, slots=True)
class Viewer:
    """Whose records somebody sees and makes."""

    name: str
    """The name of the key; empty without keys. What is made belongs to it."""
    sees_all: bool = False
    """An admin key sees the records of all."""

    def sees(self, owner: str) -> bool:
        """Whether it sees a record of this owner."""
        return self.sees_all or owner == self.name


def viewer_of(request: Request) -> Viewer:
    """Whose records the sender of a request sees."""
    access = access_of(request)
    return Viewer(access.caller.name, sees_all=access.admin)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that a client uploaded, or that was made for one. Times are Unix seconds."""

    id: str
    """`file-` and 32 hexadecimal digits."""
    owner: str
    """The name of the key that it belongs to; empty without keys."""
    filename: str
    purpose: Purpose
    nbytes: int
    created_at: int
    expires_at: int | None = None
    """When it is deleted; None: when somebody deletes it."""


@dataclass(frozen=True, slots=True)
class FileLimits:
    """The bounds of what is stored."""

    max_file_bytes: int = 2**29
    storage_bytes: int = 10 * 2**30
    """Of all files together."""
    storage_bytes_per_key: int = 10 * 2**30
    max_age_s: float = math.inf

    @classmethod
    def of(cls, settings: ServerSettings) -> FileLimits:
        """The configured ones."""
        return cls(
            settings.max_file_bytes,
            settings.file_storage,
            settings.file_storage_per_key,
            settings.file_age,
        )
