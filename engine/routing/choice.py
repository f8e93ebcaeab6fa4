"""What a route would choose for a request, and why."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.route_config import Preference
from engine.routing.complexity import Complexity


@dataclass(frozen=True, slots=True)
class Option:
    """One model that a route may choose."""

    model: str
    reason: str
    """Why it cannot be chosen, in words; empty: it can."""
    quality: float
    price: float | None = None
    """Dollars that the request is expected to cost; None: nobody looked."""
    seconds: float | None = None
    """Until the whole answer: what is ahead of it, the load or wake, and the run."""
    cost: float | None = None
    """The price and what the seconds are worth, in dollars."""
    param: str | None = None
    """The field of the request that it cannot serve."""

    @property
    def capable(self) -> bool:
        """Whether it can be chosen."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class Choice:
    """The models of a route for one request, the best first; those that cannot do it last.

    The same for a model and its fallbacks, in their order.
    """

    route: str
    prefer: Preference | None
    """None for a model: its fallbacks have an order."""
    complexity: Complexity | None
    needed_quality: float
    options: tuple[Option, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Those that can do it, in the order in which they are tried."""
        return tuple(option.model for option in self.options if option.capable)

    def refusal(self) -> InvalidRequest:
        """The error for a request that none of them can do."""
        why = "; ".join(f"{option.model}: {option.reason}" for option in self.options)
        param = next((option.param for option in self.options if option.param), "model")
        return InvalidRequest(
            f"No model of the route {self.route!r} can do this request. {why}", param=param
        )
