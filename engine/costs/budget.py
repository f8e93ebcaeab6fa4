"""One budget: what was spent of it, what runs may still spend, and whether more may begin."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.cost_config import BudgetConfig
from engine.costs.period import Unit, end, period

LEVELS = (80, 90, 100)
"""Percent of a limit at which there is a warning."""

_NAMES: dict[Unit, str] = {"day": "this day", "month": "this month"}


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """A limit as it stands. Dollars, and unix seconds."""

    key: str | None
    provider: str | None
    period: Unit
    limit: float
    spent: float
    reserved: float
    when_spent: str
    ends_at: float


@dataclass(frozen=True, slots=True)
class BudgetWarning:
    """A limit of which `level` percent are spent."""

    status: BudgetStatus
    level: int
    text: str
    """For people."""
    webhook: str | None


class Room(Enum):
    """Whether a request fits into a limit."""

    ENOUGH = "enough"
    RESERVED = "reserved"
    """Not beside the requests that run."""
    SPENT = "spent"


class Limit:
    """The dollars of one period."""

    def __init__(self, unit: Unit, dollars: float, now: float) -> None:
        self.unit: Unit = unit
        self.dollars = dollars
        self.spent = 0.0
        self._period = period(unit, now)
        self._told = 0
        """The highest level of which somebody was told in this period."""

    def begin_with(self, spent: float) -> None:
        """Take what was spent before this budget was there. Of that nobody is told again."""
        self.spent = spent
        self._told = self._level()

    def roll(self, now: float) -> None:
        """Begin anew in a new period. A clock that was set back begins none."""
        current = period(self.unit, now)
        if current > self._period:
            self._period = current
            self.spent = 0.0
            self._told = 0

    def room(self, worst: float, reserved: float, running: int) -> Room:
        """Whether a request fits that may cost `worst`, beside `running` ones."""
        if self.spent + reserved + worst <= self.dollars and self.spent < self.dollars:
            return Room.ENOUGH
        if self.spent >= self.dollars:
            return Room.SPENT
        # Alone it may overspend, by no more than its own cost. Otherwise the rest would be lost.
        return Room.RESERVED if running else Room.ENOUGH

    def spend(self, dollars: float) -> int | None:
        """Add a cost; the level that is reached with it, the highest only."""
        self.spent += dollars
        level = self._level()
        if level <= self._told:
            return None
        self._told = level
        return level

    def _level(self) -> int:
        if not self.dollars:
            return 0
        share = self.spent / self.dollars * 100
        # In binary 0.8 of a limit may be a hair less.
        return max((level for level in LEVELS if share >= level - 1e-9), default=0)


class Budget:
    """A budget of the configuration or of a key. For one thread."""

    def __init__(self, config: BudgetConfig, now: float) -> None:
        self.config = config
        self._running = 0
        self._reserved = 0.0
        dollars: tuple[tuple[Unit, float | None], ...] = (
            ("day", config.day),
            ("month", config.month),
        )
        self.limits = [Limit(unit, limit, now) for unit, limit in dollars if limit is not None]

    @property
    def free(self) -> bool:
        """Whether requests pass to models that the budget still admits, once it is spent."""
        return self.config.when_spent == "free"

    def roll(self, now: float) -> None:
        """Begin the periods that are due."""
        for limit in self.limits:
            limit.roll(now)

    def full(self, worst: float) -> tuple[Limit, Room] | None:
        """The limit that has no room for a request; None if all have."""
        rooms = [(limit, limit.room(worst, self._reserved, self._running)) for limit in self.limits]
        # The later end first: what waits for a day would then wait for the month.
        for kind in (Room.SPENT, Room.RESERVED):
            for limit, room in reversed(rooms):
                if room is kind:
                    return limit, room
        return None

    def reserve(self, dollars: float) -> None:
        """A request begins that may cost so much."""
        self._running += 1
        self._reserved += dollars

    def release(self, dollars: float) -> None:
        """It has ended."""
        self._running -= 1
        # Sums of fractions leave a rest, which must not stay for ever.
        self._reserved = self._reserved - dollars if self._running else 0.0

    def spend(self, dollars: float, now: float) -> list[BudgetWarning]:
        """Add a cost; what to tell of it."""
        warnings = []
        for limit in self.limits:
            level = limit.spend(dollars)
            if level is not None:
                text = (
                    f"{level}% of {self.name(limit)} are spent:"
                    f" ${limit.spent:.2f} of ${limit.dollars:.2f}"
                )
                status = self.status(limit, now)
                warnings.append(BudgetWarning(status, level, text, self.config.webhook))
        return warnings

    def status(self, limit: Limit, now: float) -> BudgetStatus:
        """One of its limits as it stands."""
        return BudgetStatus(
            key=self.config.key,
            provider=self.config.provider,
            period=limit.unit,
            limit=limit.dollars,
            spent=limit.spent,
            reserved=self._reserved,
            when_spent=self.config.when_spent,
            ends_at=end(limit.unit, now),
        )

    def name(self, limit: Limit) -> str:
        """A limit in words."""
        whose = []
        if self.config.key is not None:
            whose.append(f"of the key {self.config.key!r}")
        if self.config.provider is not None:
            whose.append(f"for the provider {self.config.provider!r}")
        return " ".join(["the budget", *(whose or ["of this server"]), "for", _NAMES[limit.unit]])
