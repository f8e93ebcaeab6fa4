"""The configuration of costs and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from engine.section import Section


class CostConfig(Section):
    """What this machine costs, and what its answers are compared with. Money is in dollars."""

    price_per_hour: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The rent of this machine."""
    watts: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The power that it takes beyond idling while a model runs."""
    price_per_kwh: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    value_of_time: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Dollars an hour of waiting is worth, for routes."""
    compare: Mapping[str, str] = Field(default_factory=dict)
    """The cloud's model that a task would have been paid for otherwise, as `generate: gpt-4o`."""


class BudgetConfig(Section):
    """What may be spent in a day or a month (UTC): in all, by a key, or at a provider."""

    key: str | None = None
    """The name of a key. Neither a key nor a provider: all of them together."""
    provider: str | None = None
    """A provider of remote models."""
    day: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Dollars a day."""
    month: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Dollars a calendar month."""
    when_spent: Literal["refuse", "free"] = "refuse"
    """`refuse` answers 429; `free` passes to models that cost nothing, if there are any."""
    webhook: str | None = None
    """A URL that gets a POST at 80, 90 and 100 percent."""

    @field_validator("webhook")
    @classmethod
    def _webhook_is_a_url(cls, url: str | None) -> str | None:
        # The message must not contain the address: whoever knows that of a chat can write there.
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it begins with http:// or https:// and a host")
        return url
