"""The headers of this server's own: where an answer's time went, and what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.session import Session

HEADER_PREFIX = "x-roundhouse-"


def answer_headers(session: Session, ran_ms: float = 0.0) -> dict[str, str]:
    """What is known now; `ran_ms` is how long the session ran beyond its first event.

    A stream's headers are sent before its peak is known, and tell its run up to its first event.
    """
    timings = session.timings
    headers = {
        f"{HEADER_PREFIX}queue-ms": f"{timings.queue_ms:.1f}",
        f"{HEADER_PREFIX}load-ms": f"{timings.load_ms:.1f}",
        f"{HEADER_PREFIX}run-ms": f"{timings.run_ms + ran_ms:.1f}",
        f"{HEADER_PREFIX}tier": timings.tier,
    }
    if session.peak.nbytes is not None:
        headers[f"{HEADER_PREFIX}peak-bytes"] = str(session.peak.nbytes)
    return headers
