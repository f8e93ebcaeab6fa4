"""What requests cost, and whether they may: prices, budgets and usage together.

Before a request runs, `Accounts.reserve` sets aside what it may cost at most. When it has ended,
on whatever way, `Reservation.settle` replaces that by what it did cost. So requests at the same
time cannot spend the same dollars: together they overspend a budget by no more than the cost of one
of them. That one is a request that no other ran beside, or one that cost more than was to be
foreseen.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from prometheus_client.registry import CollectorRegistry

from engine.config import EngineConfig, ModelConfig
from engine.cost_config import BudgetConfig
from engine.costs.budget import Budget, BudgetStatus, BudgetWarning, Limit, Room
from engine.costs.cost_metrics import CostMetrics
from engine.costs.expected import Expectations, most
from engine.costs.period import end, period
from engine.costs.prices import Price, Prices, machine_rate
from engine.costs.provider import LOCAL, provider_of
from engine.costs.usage_store import Counts, Row, UsageStore
from engine.costs.webhook import Webhook
from engine.errors import BudgetExceeded, BudgetReserved
from engine.requests import Request
from engine.usage import Usage

log = logging.getLogger(__name__)

RESERVED_RETRY_S = 2.0
"""When a request may fit that only lacks what running ones have reserved."""

MEANS_S = 30 * 86_400.0
"""How far back the means of an earlier process count."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request cost, in dollars."""

    cost: float
    saved: float
    """What the model of `costs.compare` would have cost beyond that; negative if it is cheaper."""
    device_s: float


class Reservation:
    """What a request may cost at most, until it is settled."""

    __slots__ = ("_accounts", "_budgets", "_charge", "_dollars", "model", "request")

    def __init__(
        self,
        accounts: Accounts,
        model: ModelConfig,
        request: Request,
        budgets: Sequence[Budget],
        dollars: float,
    ) -> None:
        self.model = model
        self.request = request
        self._accounts = accounts
        self._budgets = budgets
        self._dollars = dollars
        self._charge: Charge | None = None
        for budget in budgets:
            budget.reserve(dollars)

    def settle(self, usage: Usage | None, device_s: float = 0.0, *, served: bool) -> Charge:
        """Replace the reservation by what the request took. A second call changes nothing.

        Call it on each way out. `usage` is None if the request never ran. `served` is whether its
        caller got an answer, or the beginning of one.
        """
        if self._charge is None:
            for budget in self._budgets:
                budget.release(self._dollars)
            self._charge = self._accounts.charge(
                self.model, self.request, usage or Usage(), device_s, served=served
            )
        return self._charge


class Accounts:
    """The prices, the budgets and the usage of one engine. Lives on its event loop."""

    def __init__(
        self,
        config: EngineConfig,
        registry: CollectorRegistry | None = None,
        *,
        on_warning: Callable[[BudgetWarning], None] = lambda _: None,
        now: Callable[[], float] = time.time,
        webhook: Webhook | None = None,
    ) -> None:
        """`now` gives unix seconds; days and months are those of UTC."""
        self._config = config
        self._costs = config.costs
        self._rate = machine_rate(config.costs)
        self._now = now
        self._on_warning = on_warning
        self._prices = Prices(config)
        self._store = UsageStore(config.data_dir)
        self._metrics = CostMetrics(registry or CollectorRegistry())
        self._webhook = webhook or Webhook()
        self._expected: dict[str, Expectations] = {}
        self._loading: asyncio.Future[None] | None = None
        self._day = ""
        self._day_ends = 0.0
        self._spent: dict[tuple[str, str], list[float]] = {}
        """Dollars of this day and month, by key and provider: for budgets that come later."""
        self._key_budgets: tuple[BudgetConfig, ...] = ()
        self._budgets: dict[tuple[str | None, str | None], list[Budget]] = {}
        self._build_budgets()

    async def start(self) -> None:
        """Read the tables of prices, and what was spent before. Call it before `reserve`."""
        # A start that is given up does not end the thread, so `stop` waits for it.
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        await asyncio.shield(self._loading)
        self._budgets = {}
        self._build_budgets()
        known = {provider_of(model) for model in self._config.models} - {LOCAL}
        for config in self._config.budgets:
            if config.provider is not None and config.provider not in known:
                log.warning("budgets: no model has the provider %r", config.provider)

    def _load(self) -> None:
        for line in self._prices.load():
            log.warning("%s", line)
        self._store.open()
        now = self._now()
        self._day, self._day_ends = period("day", now), end("day", now)
        spent = self._store.spending(self._day)
        self._spent = {pair: list(dollars) for pair, dollars in spent.items()}
        means = self._store.means(period("day", now - MEANS_S), self._day)
        for model_id, mean in means.items():
            self._expectations(model_id).seed(mean.output_tokens, mean.device_s)

    async def stop(self) -> None:
        """Write what is left. Nothing is settled after it."""
        if self._loading is not None:
            await asyncio.wait((self._loading,))
        await self._webhook.close()
        await asyncio.to_thread(self._store.close)

    def set_key_budgets(self, budgets: Sequence[BudgetConfig]) -> None:
        """Take the budgets of stored keys, beside those of the configuration.

        What their keys spent before in this day and month counts.
        """
        self._key_budgets = tuple(budgets)
        self._build_budgets()

    def _build_budgets(self) -> None:
        """Make the budgets. Those that stay as they were keep what they know."""
        now = self._now()
        self._roll(now)
        kept = list(self._every_budget())
        self._budgets = {}
        for config in (*self._config.budgets, *self._key_budgets):
            budget = next((each for each in kept if each.config == config), None)
            if budget is None:
                budget = Budget(config, now)
                for limit in budget.limits:
                    limit.begin_with(self._spent_of(config, limit))
            else:
                kept.remove(budget)
            self._budgets.setdefault((config.key, config.provider), []).append(budget)

    def _spent_of(self, config: BudgetConfig, limit: Limit) -> float:
        return sum(
            dollars[limit.unit == "month"]
            for (key, provider), dollars in self._spent.items()
            if config.key in (None, key) and config.provider in (None, provider)
        )

    def _every_budget(self) -> Iterator[Budget]:
        return chain.from_iterable(self._budgets.values())

    def _applying(self, key: str, provider: str) -> list[Budget]:
        """The budgets that count what a key spends at a provider."""
        if not self._budgets:
            return []
        places = ((key, provider), (key, None), (None, provider), (None, None))
        return [budget for place in places for budget in self._budgets.get(place, ())]

    def _roll(self, now: float) -> None:
        """Begin the day and the month that are due."""
        if now < self._day_ends:  # also of a clock that was set back
            return
        day = period("day", now)
        self._day_ends = end("day", now)
        new_month = day[:7] != self._day[:7]
        for dollars in self._spent.values():
            dollars[0] = 0.0
            if new_month:
                dollars[1] = 0.0
        self._day = day
        for budget in self._every_budget():
            budget.roll(now)

    def reserve(self, model: ModelConfig, request: Request) -> Reservation:
        """Set aside what a request may cost at most. Then it must be settled.

        A model that costs nothing is always admitted.

        Raises:
            BudgetExceeded: a budget has no room for it. With `free` the request may go to another
                model; that one is to be reserved again, and may be refused as well.

        """
        caller = request.scheduling.caller
        if not self._budgets or self.is_free(model):
            return Reservation(self, model, request, (), 0.0)
        now = self._now()
        self._roll(now)
        budgets = self._applying(caller.name, provider_of(model))
        if not budgets:
            return Reservation(self, model, request, (), 0.0)
        worst = self._worst(model, request)
        refusals = [
            (budget, *full) for budget in budgets if (full := budget.full(worst)) is not None
        ]
        if refusals:
            raise _refusal(refusals, now)
        return Reservation(self, model, request, budgets, worst)

    def price(self, model: ModelConfig, request: Request) -> float:
        """The dollars that a request will most likely cost; infinity if nobody knows the price."""
        expectations = self._expectations(model.id)
        if provider_of(model) == LOCAL:
            return self._rate * expectations.device_s
        price = self._prices.of(model)
        if price is None:
            return math.inf
        return 0.0 if price.free else price.cost(expectations.usage(request, price.context))

    def is_free(self, model: ModelConfig) -> bool:
        """Whether a model costs nothing: neither its provider nor this machine."""
        if provider_of(model) == LOCAL:
            return self._rate == 0
        price = self._prices.of(model)
        return price is not None and price.free

    def charge(
        self, model: ModelConfig, request: Request, usage: Usage, device_s: float, *, served: bool
    ) -> Charge:
        """Count what a request took. `Reservation.settle` calls it once."""
        provider = provider_of(model)
        caller = request.scheduling.caller
        now = self._now()
        self._roll(now)
        cost = self._cost(model, usage, device_s)
        saved = (self._compared(model.task, usage) if served else 0.0) - cost
        self._metrics.count(model.id, provider, usage, device_s, cost, saved)
        self._store.add(
            Row(self._day, caller.name, model.id, provider),
            _counts(usage, device_s, cost, saved, served=served),
        )
        if served:
            remote = provider != LOCAL
            self._expectations(model.id).learn(request, usage, device_s, remote=remote)
        if cost:
            spent = self._spent.setdefault((caller.name, provider), [0.0, 0.0])
            spent[0] += cost
            spent[1] += cost
            for budget in self._applying(caller.name, provider):
                for warning in budget.spend(cost, now):
                    self._warn(warning)
        return Charge(cost, saved, device_s)

    def budgets(self, key: str | None = None) -> list[BudgetStatus]:
        """The limits as they stand: all, or those of one key."""
        now = self._now()
        self._roll(now)
        return [
            budget.status(limit, now)
            for budget in self._every_budget()
            if key is None or budget.config.key == key
            for limit in budget.limits
        ]

    async def report(
        self, by: Sequence[str], since: str | None, until: str | None, key: str | None
    ) -> list[tuple[tuple[str, ...], Counts]]:
        """What was used from day to day, grouped; see `UsageStore.report`."""
        return await asyncio.to_thread(self._store.report, by, since, until, key)

    def _expectations(self, model_id: str) -> Expectations:
        found = self._expected.get(model_id)
        if found is None:
            found = self._expected[model_id] = Expectations()
        return found

    def _worst(self, model: ModelConfig, request: Request) -> float:
        if provider_of(model) == LOCAL:
            return self._rate * self._expectations(model.id).most_device_s
        price = self._prices.of(model)
        # Where nobody knows the price, requests are refused once reported ones have spent all.
        return 0.0 if price is None else price.cost(most(request, price.context))

    def _cost(self, model: ModelConfig, usage: Usage, device_s: float) -> float:
        if provider_of(model) == LOCAL:
            return self._rate * max(0.0, device_s)
        reported = usage.price
        if reported is not None and 0 <= reported < math.inf:
            return reported
        price = self._prices.of(model)
        return 0.0 if price is None else price.cost(usage)

    def _compared(self, task: str, usage: Usage) -> float:
        price: Price | None = self._prices.compared(task)
        return 0.0 if price is None else price.cost(usage)

    def _warn(self, warning: BudgetWarning) -> None:
        log.warning("%s", warning.text)
        self._on_warning(warning)
        if warning.webhook is not None:
            document = {"type": "budget", "level": warning.level, "text": warning.text}
            self._webhook.post(warning.webhook, {**document, **asdict(warning.status)})


def _refusal(refusals: Sequence[tuple[Budget, Limit, Room]], now: float) -> BudgetExceeded:
    """The error for a request that these budgets do not admit: of the strictest of them."""
    free = all(budget.free for budget, _, _ in refusals)
    spent = [each for each in refusals if each[2] is Room.SPENT]
    if spent:
        budget, limit, _ = max(spent, key=lambda each: end(each[1].unit, now))
        return BudgetExceeded(
            f"{_capital(budget.name(limit))} (${limit.dollars:.2f}) is spent.",
            retry_after_s=end(limit.unit, now) - now,
            free=free,
        )
    budget, limit, _ = refusals[0]
    return BudgetReserved(
        f"Requests that run may spend what is left of {budget.name(limit)}.",
        retry_after_s=RESERVED_RETRY_S,
        free=free,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counts(usage: Usage, device_s: float, cost: float, saved: float, *, served: bool) -> Counts:
    """In the order of `COUNTS`."""
    seconds = usage.heard_s + usage.spoken_s + usage.video_s
    return (
        1,
        0 if served else 1,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.images,
        usage.characters,
        seconds,
        device_s,
        cost,
        saved,
    )
