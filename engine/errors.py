"""Every error that a caller of the engine can meet.

The tree::

    EngineError
    ├── ConfigError                the configuration cannot be served as written
    ├── InvalidRequest             the request itself is wrong; `param` names the field
    ├── ModelNotFound              no model has that id or alias
    ├── ModelForbidden             the caller may not use it, if it exists
    ├── NotFound                   there is no such job or file, or no longer
    ├── Conflict                   the model's state forbids it now (in use, pinned)
    │   └── NotLoaded              it would have to be loaded, and the request forbade that
    ├── Overloaded                 try again later; `retry_after_s` says when
    │   ├── QueueFull              the model's queue is at its bound
    │   ├── QueueTimeout           waited its whole time without being granted
    │   ├── ProviderBusy           the provider of a remote model takes no more for now
    │   ├── BudgetExceeded         what may be spent is spent
    │   │   └── BudgetReserved     what is left of it is reserved by requests that run
    │   └── ShuttingDown           the engine accepts no new work
    ├── InsufficientCapacity       would not fit even on an empty device
    ├── NoSpaceLeft                the disk is full
    ├── LoadFailed                 the runtime could not load the model
    ├── OutOfDeviceMemory          ran out of memory while running
    └── RuntimeFailed              the native library failed while running
        └── ProviderFailed         the provider of a remote model failed

Catch by type. The HTTP status of each lives in one table, `server/errors.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import ClassVar, Self

SQLITE_FULL = 13
"""SQLite's result code for a full disk. Its module takes time to import."""


class EngineError(Exception):
    """Base of the tree.

    `message` is written for the person who made the request; `code` is a
    stable machine-readable word; `param` is the request field at fault.
    """

    code: ClassVar[str] = "engine_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def reworded(self, message: str) -> Self:
        """The same error with another message. Others may wait for this one: it stays."""
        other = type(self).__new__(type(self), message)
        vars(other).update(vars(self), message=message)
        return other


class ConfigError(EngineError):
    """The configuration is wrong; the message names the key."""

    code = "config_error"


class InvalidRequest(EngineError):
    """The request is malformed or asks for what the model cannot do.

    `status` keeps the 4xx status that the native library chose, where it chose one. `details` are
    for a client that can go on without what was refused.
    """

    code = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.details = details


class ModelNotFound(EngineError):
    """No configured model has this id or alias."""

    code = "model_not_found"


class ModelForbidden(EngineError):
    """The caller may not use a model of this name. It says nothing of whether there is one."""

    code = "model_forbidden"


class NotFound(EngineError):
    """No job or file has this name, or its files have expired."""

    code = "not_found"


class Conflict(EngineError):
    """The model's present state forbids the operation."""

    code = "conflict"


class NotLoaded(Conflict):
    """The request is for a loaded model only, and this one would have to be brought in.

    `tier` is where the model's bytes are (`host` or `disk`), `load_s` how many seconds it is
    expected to take to bring it in, None where nobody knows yet, and `evicts` the models that
    would have to leave for it.
    """

    code = "model_not_loaded"

    def __init__(
        self, message: str, *, tier: str, load_s: float | None, evicts: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, param="if_loaded_only")
        self.tier = tier
        self.load_s = load_s
        self.evicts = evicts


class Overloaded(EngineError):
    """The engine cannot take the work now; it may in `retry_after_s` seconds."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """Too many requests already wait."""

    code = "queue_full"


class QueueTimeout(Overloaded):
    """The request waited its whole time without being granted."""

    code = "queue_timeout"


class ProviderBusy(Overloaded):
    """The provider of a remote model takes no more for now: its limits, or it has lately failed."""

    code = "provider_busy"


class BudgetExceeded(Overloaded):
    """What may be spent in this day or month is spent; `retry_after_s` is until the next.

    `free` is whether the budget lets the request pass to models that it still admits. Otherwise
    the request ends here, also with fallbacks.
    """

    code = "budget_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, free: bool = False) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.free = free


class BudgetReserved(BudgetExceeded):
    """Requests that run may spend what is left of the budget. Soon there may be more."""

    code = "budget_reserved"


class ShuttingDown(Overloaded):
    """The engine is draining and accepts no new work."""

    code = "shutting_down"


class InsufficientCapacity(EngineError):
    """The model or request would not fit even on an otherwise empty device."""

    code = "insufficient_capacity"


class NoSpaceLeft(EngineError):
    """The disk of the server is full; the message says for what."""

    code = "no_space_left"

    @classmethod
    def of(cls, error: BaseException, what: str) -> NoSpaceLeft | None:
        """The error for `what` if `error` is that of a full disk or quota, otherwise None."""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = getattr(error, "sqlite_errorcode", None)
        if full or code == SQLITE_FULL:
            return cls(f"The server has no space left for {what}.")
        return error if isinstance(error, cls) else None


class LoadFailed(EngineError):
    """The runtime could not load the model; the message carries the reason."""

    code = "model_load_failed"


class OutOfDeviceMemory(EngineError):
    """The device ran out of memory while the request ran."""

    code = "out_of_device_memory"


class RuntimeFailed(EngineError):
    """The native library failed while the request ran."""

    code = "runtime_failed"


class ProviderFailed(RuntimeFailed):
    """The provider of a remote model gave an error or no answer, or could not be reached."""

    code = "provider_failed"


def reason(error: BaseException) -> str:
    """The first line of an error, for people; the log has the rest."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
