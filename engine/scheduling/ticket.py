"""A request that waits for its lease."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EngineError
from engine.requests import Priority
from engine.scheduling.lease import Lease


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ticket:
    """A request that waits for a lease.

    Exactly one of `on_granted` and `on_refused` is called, once, unless the ticket is
    cancelled first. Neither may raise. `working_bytes` is the device memory that the run needs
    beside the model. An `exclusive` ticket runs alone.
    """

    request_id: str
    model_id: str
    operation: str
    working_bytes: int = 0
    priority: Priority = Priority.NORMAL
    timeout_s: float = math.inf
    waited_s: float = 0.0
    """Seconds that the request had waited before it came to the queue."""
    exclusive: bool = False
    no_evict: bool = False
    """No other model may leave the device for it."""
    if_loaded_only: bool = False
    """Refuse it rather than bring its model in."""
    adapters: tuple[str, ...] = ()
    """The LoRAs that its run uses."""
    keep_alive_s: float | None = None
    """From the grant on, how long the model may stay idle; None changes nothing."""
    on_granted: Callable[[Lease], None]
    on_refused: Callable[[EngineError], None]
