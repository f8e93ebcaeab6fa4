"""Days and calendar months in UTC, in which money is counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

Unit = Literal["day", "month"]


def period(unit: Unit, now: float) -> str:
    """The period of a unix time: `2026-03-05` or `2026-03`. Later ones are greater."""
    return f"{datetime.fromtimestamp(now, UTC):{'%Y-%m-%d' if unit == 'day' else '%Y-%m'}}"


def end(unit: Unit, now: float) -> float:
    """The unix time at which the period of `now` ends."""
    at = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "day":
        return (at + timedelta(days=1)).timestamp()
    return (at.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()
