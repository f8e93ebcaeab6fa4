"""The headers of our own: what an answer took, what was cut, and whether it means anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.files.source import Source

if TYPE_CHECKING:
    from engine.scheduling.lease import LeaseTimings
    from engine.session import Session

HEADER_PREFIX = "x-roundhouse-"

CACHE_HEADER = f"{HEADER_PREFIX}cache"
"""Of a request: what it wants of the response cache. Of an answer: what the cache did."""

SERVED_BY_HEADER = f"{HEADER_PREFIX}served-by"
"""The id of the model that answered."""

FETCH_MS = 10.0
"""A wait for files that is worth a header. Looking whether they are here takes less."""

ANSWER_HEADERS = tuple(
    f"{HEADER_PREFIX}{name}"
    for name in (
        "fetch-ms",
        "queue-ms",
        "load-ms",
        "run-ms",
        "tier",
        "peak-bytes",
        "cut",
        "weights",
        "served-by",
        "attempts",
        "cache",
        "cost",
        "device-ms",
    )
)
"""All that `answer_headers` and the response cache may give."""


@dataclass(frozen=True, slots=True)
class HeldModels:
    """What kept the models of an answer on the device before its session began."""

    timings: LeaseTimings
    random_weights: bool
    """Whether one of them has such weights."""


def answer_headers(
    session: Session, ran_ms: float = 0.0, held: HeldModels | None = None
) -> dict[str, str]:
    """The headers of a session. `ran_ms` is how long it ran beyond its first event.

    A stream's headers are sent at its first event. So they have the run up to that, no peak and no
    cost.
    """
    timings = session.timings
    queue_ms, load_ms, tier = timings.queue_ms, timings.load_ms, timings.tier
    if held is not None:  # the session itself found its model ready
        load_ms += held.timings.load_s * 1e3
        queue_ms += (held.timings.queued_s - held.timings.load_s) * 1e3
        tier = held.timings.tier
    headers = {
        f"{HEADER_PREFIX}queue-ms": f"{queue_ms:.1f}",
        f"{HEADER_PREFIX}load-ms": f"{load_ms:.1f}",
        f"{HEADER_PREFIX}run-ms": f"{timings.run_ms + ran_ms:.1f}",
        f"{HEADER_PREFIX}tier": tier,
        SERVED_BY_HEADER: session.model.id,
    }
    if session.attempts:
        # As in `small=queue_timeout, cloud=provider_busy`: models tried before, and their errors.
        headers[f"{HEADER_PREFIX}attempts"] = ", ".join(
            f"{attempt.model}={attempt.code}" for attempt in session.attempts
        )
    if timings.fetch_ms >= FETCH_MS:
        headers[f"{HEADER_PREFIX}fetch-ms"] = f"{timings.fetch_ms:.1f}"
    if session.notes.peak_bytes is not None:
        headers[f"{HEADER_PREFIX}peak-bytes"] = str(session.notes.peak_bytes)
    if session.notes.cuts:
        # As in `prompt=112/250, hotwords=111/300`: tokens kept, of tokens given.
        headers[f"{HEADER_PREFIX}cut"] = ", ".join(
            f"{cut.param}={cut.kept}/{cut.given}" for cut in session.notes.cuts
        )
    if session.charge is not None:
        cost = f"{session.charge.cost:.9f}".rstrip("0").rstrip(".")
        headers[f"{HEADER_PREFIX}cost"] = cost
        headers[f"{HEADER_PREFIX}device-ms"] = f"{session.charge.device_s * 1e3:.1f}"
    headers.update(weights_header(session.model.source))
    if held is not None and held.random_weights:
        headers[f"{HEADER_PREFIX}weights"] = "random"
    return headers


def weights_header(source: str) -> dict[str, str]:
    """Say of a model's answer that its weights are random; nothing of any other's."""
    return {f"{HEADER_PREFIX}weights": "random"} if Source(source).random_weights else {}
