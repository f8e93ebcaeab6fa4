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

    A `hold` is for a session of many runs. Its lease keeps several models on the device, and takes
    a place on none of them: each run has a ticket of its own. It is granted once all are there.
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
    hold: bool = False
    further_models: tuple[str, ...] = ()
    """Of a hold: the models that it keeps beside `model_id`."""
    adapters: tuple[str, ...] = ()
    """The LoRAs that its run uses."""
    keep_alive_s: float | None = None
    """From the grant on, how long the model may stay idle; None changes nothing."""
    on_granted: Callable[[Lease], None]
    on_refused: Callable[[EngineError], None]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that it waits for."""
        return (self.model_id, *self.further_models)
