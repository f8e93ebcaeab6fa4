"""An administrator's order to take an idle model off the device.

The order in which tickets are served is `service_order` in `engine.scheduling.planner`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

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


class TakesOrders(Protocol):
    """The scheduler, as far as orders go."""

    def on_order(self, order: Order) -> None:
        """Carry an order out as soon as its model is idle."""

    def on_order_cancelled(self, order: Order) -> None:
        """Forget an order."""


async def carried_out(
    scheduler: TakesOrders, kind: OrderKind, model_id: str, timeout_s: float
) -> None:
    """Give an order, and return once its model is off the device.

    Raises:
        EngineError: the order was refused.

    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_done() -> None:
        if not done.cancelled():
            done.set_result(None)

    def on_refused(error: EngineError) -> None:
        if not done.cancelled():
            done.set_exception(error)

    order = Order(
        kind=kind, model_id=model_id, timeout_s=timeout_s, on_done=on_done, on_refused=on_refused
    )
    try:
        scheduler.on_order(order)
        await done
    finally:
        done.cancel()
        scheduler.on_order_cancelled(order)
