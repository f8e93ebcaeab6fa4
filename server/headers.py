"""The headers of this server's own: what a request may set, and what an answer tells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from engine.errors import InvalidRequest
from engine.requests import Priority

if TYPE_CHECKING:
    from engine.engine import Timings

PRIORITY_HEADER = "x-roundhouse-priority"
TIMEOUT_HEADER = "x-roundhouse-timeout"


def read_priority(headers: Headers, default: Priority = Priority.NORMAL) -> Priority:
    """The order among waiting requests that the request asks for.

    Raises:
        InvalidRequest: it is no priority.

    """
    value = headers.get(PRIORITY_HEADER)
    if value is None:
        return default
    try:
        return Priority[value.strip().upper()]
    except KeyError:
        names = ", ".join(priority.name.lower() for priority in Priority)
        raise InvalidRequest(
            f"The priority must be one of {names}.", param=PRIORITY_HEADER
        ) from None


def read_timeout_s(headers: Headers) -> float | None:
    """Seconds that the request is willing to wait for a grant; None where it does not say.

    Raises:
        InvalidRequest: it is no number above 0.

    """
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequest("The timeout must be seconds above 0.", param=TIMEOUT_HEADER)
    return timeout_s


def timing_headers(timings: Timings) -> dict[str, str]:
    """Where the request's time went, in milliseconds."""
    return {
        "x-roundhouse-queue-ms": f"{timings.queue_ms:.1f}",
        "x-roundhouse-load-ms": f"{timings.load_ms:.1f}",
        "x-roundhouse-run-ms": f"{timings.run_ms:.1f}",
    }
