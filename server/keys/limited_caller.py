"""The caller of a key with limits."""

from __future__ import annotations

from engine.caller import Caller
from engine.usage import Usage
from server.keys.limiter import Limiter


class LimitedCaller(Caller):
    """Charges the tokens of its requests to the limits of its key."""

    __slots__ = ("_limiter",)
    _limiter: Limiter

    def __init__(self, name: str, tier: str, limiter: Limiter) -> None:
        super().__init__(name, tier)
        # The base class is frozen. No field: a record of the caller is its name and tier.
        object.__setattr__(self, "_limiter", limiter)

    def count(self, usage: Usage) -> None:
        """Charge what a request took."""
        self._limiter.count_tokens(usage.input_tokens + usage.output_tokens)
