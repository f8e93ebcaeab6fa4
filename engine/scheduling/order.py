"""An administrator's order to take an idle model off the device.

The order in which tickets are served is `service_order` in `engine.scheduling.planner`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import EngineError


class OrderKind(StrEnum):
    """What to do with the model."""

    PARK = "park"
    """Take all of it off the device; it stays loaded."""
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """An order that waits until its model is off the device.

    Exactly one of `on_done` and `on_refused` is called, once, unless the order is cancelled first.
    Neither may raise.
    """

    kind: OrderKind
    model_id: str
    timeout_s: float = math.inf
    on_done: Callable[[], None]
    on_refused: Callable[[EngineError], None]
