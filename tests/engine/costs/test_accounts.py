"""Budgets hold: at once, over the end of a day, over a restart, and on every way out."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.caller import Caller
from engine.config import EngineConfig, ModelConfig
from engine.cost_config import BudgetConfig
from engine.costs.accounts import Accounts, Reservation
from engine.costs.budget import BudgetWarning
from engine.costs.period import end, period
from engine.costs.webhook import Webhook
from engine.errors import BudgetExceeded, BudgetReserved
from engine.requests import SchedulingOptions, TextOperation, TextRequest
from engine.usage import Usage

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
HOUR_S = 3600.0
CENT = 10_000
"""Output tokens of the model `cloud` that cost a cent."""


class Now:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def now() -> Now:
    return Now()


def config(folder: Path, *budgets: dict[str, Any], **costs: Any) -> EngineConfig:
    priced = {"runtime": "remote", "source": "http://cloud.example/v1"}
    models = [
        {"id": "cloud", **priced, "options": {"price": {"output": 1.0}}},
        {"id": "other", **priced, "options": {"price": {"output": 1.0}, "provider": "else"}},
        {"id": "gift", **priced, "options": {"price": {}}},
        {"id": "unknown", **priced, "options": {"model": "nobody-knows-it"}},
        {"id": "local", "source": "any"},
    ]
    raw = {"data_dir": folder, "models": models, "budgets": budgets, "costs": costs}
    return EngineConfig.model_validate(raw)


@asynccontextmanager
async def started(
    folder: Path, now: Now, *budgets: dict[str, Any], **more: Any
) -> AsyncIterator[Accounts]:
    costs = more.pop("costs", {})
    accounts = Accounts(config(folder, *budgets, **costs), now=now, **more)
    await accounts.start()
    try:
        yield accounts
    finally:
        await accounts.stop()


def request(key: str = "", tokens: int = CENT) -> TextRequest:
    scheduling = SchedulingOptions(caller=Caller(key))
    return TextRequest("any", TextOperation.CHAT, {"max_tokens": tokens}, "test", scheduling)


def model(accounts: Accounts, name: str = "cloud") -> ModelConfig:
    return accounts._config.find(name)


def reserve(
    accounts: Accounts, name: str = "cloud", key: str = "", tokens: int = CENT
) -> Reservation:
    return accounts.reserve(model(accounts, name), request(key, tokens))


def spend(accounts: Accounts, dollars: float, name: str = "cloud", key: str = "") -> None:
    tokens = round(dollars * 100 * CENT)
    reserve(accounts, name, key, tokens).settle(Usage(output_tokens=tokens), served=True)


def spent(accounts: Accounts) -> list[float]:
    return [round(status.spent, 9) for status in accounts.budgets()]


async def test_two_hundred_at_once_overspend_by_no_more_than_the_largest(
    tmp_path: Path, now: Now
) -> None:
    seed = random.Random(1)
    async with started(tmp_path, now, {"month": 1.0}) as accounts:
        costs: list[float] = []

        async def run(tokens: int) -> None:
            try:
                reservation = reserve(accounts, tokens=tokens)
            except BudgetExceeded:
                return
            for _ in range(seed.randrange(1, 5)):
                await asyncio.sleep(0)
            took = seed.randrange(tokens)
            costs.append(reservation.settle(Usage(output_tokens=took), served=True).cost)

        for _ in range(20):
            await asyncio.gather(*(run(seed.randrange(1, 30) * CENT) for _ in range(200)))
        assert len(costs) > 10
        assert 0.9 < sum(costs) <= 1.0 + max(costs)
        assert spent(accounts) == [pytest.approx(sum(costs))]
        assert accounts.budgets()[0].reserved == 0.0


async def test_what_runs_reserves_its_worst_and_gives_the_rest_back(
    tmp_path: Path, now: Now
) -> None:
    async with started(tmp_path, now, {"day": 0.021}) as accounts:
        first, second = reserve(accounts), reserve(accounts)
        with pytest.raises(BudgetReserved) as refused:
            reserve(accounts)
        assert refused.value.retry_after_s < 10
        first.settle(Usage(output_tokens=1), served=True)
        third = reserve(accounts)
        second.settle(Usage(), served=False)
        third.settle(None, served=False)
        assert spent(accounts) == [pytest.approx(1e-6)]


async def test_a_request_that_is_larger_than_the_rest_runs_alone(tmp_path: Path, now: Now) -> None:
    async with started(tmp_path, now, {"day": 0.05}) as accounts:
        large = reserve(accounts, tokens=100 * CENT)
        with pytest.raises(BudgetReserved):
            reserve(accounts, tokens=1)
        large.settle(Usage(output_tokens=100 * CENT), served=True)
        with pytest.raises(BudgetExceeded) as refused:
            reserve(accounts, tokens=1)
        assert refused.value.code == "budget_exceeded"


@pytest.mark.parametrize(("limit", "left_s"), [("day", 12 * HOUR_S), ("month", 12 * HOUR_S)])
async def test_a_period_ends_in_utc_and_another_begins(
    tmp_path: Path, now: Now, limit: str, left_s: float
) -> None:
    async with started(tmp_path, now, {limit: 0.01}) as accounts:
        spend(accounts, 0.01)
        with pytest.raises(BudgetExceeded) as refused:
            reserve(accounts)
        assert refused.value.retry_after_s == left_s
        now.at += left_s
        spend(accounts, 0.01)
        assert spent(accounts) == [0.01]
        now.at -= 2 * HOUR_S  # a clock that is set back begins nothing
        with pytest.raises(BudgetExceeded):
            reserve(accounts)


async def test_a_day_passes_and_the_month_goes_on(tmp_path: Path, now: Now) -> None:
    now.at -= 5 * 24 * HOUR_S
    async with started(tmp_path, now, {"day": 0.05, "month": 0.08}) as accounts:
        spend(accounts, 0.05)
        now.at += 24 * HOUR_S
        assert spent(accounts) == [0.0, 0.05]
        spend(accounts, 0.03)
        with pytest.raises(BudgetExceeded, match=r"this month \(\$0\.08\) is spent"):
            reserve(accounts)


async def test_what_began_before_midnight_is_paid_after_it(tmp_path: Path, now: Now) -> None:
    async with started(tmp_path, now, {"day": 1.0}) as accounts:
        reservation = reserve(accounts)
        now.at += 24 * HOUR_S
        reservation.settle(Usage(output_tokens=CENT), served=True)
        assert spent(accounts) == [0.01]
        assert accounts.budgets()[0].reserved == 0.0


async def test_spending_survives_a_restart(tmp_path: Path, now: Now) -> None:
    budgets = ({"month": 1.0}, {"key": "alice", "day": 1.0}, {"provider": "cloud", "month": 1.0})
    async with started(tmp_path, now, *budgets) as accounts:
        spend(accounts, 0.25, key="alice")
        spend(accounts, 0.5, "other", key="bob")
        assert spent(accounts) == [0.75, 0.25, 0.25]
    warnings: list[BudgetWarning] = []
    async with started(tmp_path, now, *budgets, on_warning=warnings.append) as accounts:
        assert spent(accounts) == [0.75, 0.25, 0.25]
        spend(accounts, 0.1)
        assert [warning.level for warning in warnings] == [80]
    async with started(tmp_path, now, *budgets, on_warning=warnings.append) as accounts:
        spend(accounts, 0.01)
        assert len(warnings) == 1  # it was told before


async def test_budgets_of_keys_and_providers_count_only_theirs(tmp_path: Path, now: Now) -> None:
    budgets = (
        {"key": "alice", "day": 0.01},
        {"provider": "else", "day": 0.02},
        {"key": "bob", "provider": "cloud", "day": 0.03},
    )
    async with started(tmp_path, now, *budgets) as accounts:
        spend(accounts, 0.01, key="alice")
        spend(accounts, 0.02, "other", key="bob")
        spend(accounts, 0.03, "cloud", key="bob")
        assert spent(accounts) == [0.01, 0.02, 0.03]
        for name, key in (("cloud", "alice"), ("other", "carol"), ("cloud", "bob")):
            with pytest.raises(BudgetExceeded):
                reserve(accounts, name, key)
        reserve(accounts, "cloud", "carol")
        assert [status.key for status in accounts.budgets("alice")] == ["alice"]


async def test_budgets_of_keys_come_and_go_while_requests_run(tmp_path: Path, now: Now) -> None:
    alice = BudgetConfig(key="alice", day=0.05)
    async with started(tmp_path, now) as accounts:
        spend(accounts, 0.02, key="alice")
        running = reserve(accounts, key="alice")
        accounts.set_key_budgets([alice])
        assert spent(accounts) == [0.02]
        running.settle(Usage(output_tokens=CENT), served=True)
        assert spent(accounts) == [0.03]
        reserved = reserve(accounts, key="alice", tokens=2 * CENT)
        accounts.set_key_budgets([BudgetConfig(key="bob", day=1.0), alice.model_copy()])
        with pytest.raises(BudgetReserved):
            reserve(accounts, key="alice", tokens=CENT)
        accounts.set_key_budgets([])
        reserved.settle(Usage(output_tokens=CENT), served=True)
        spend(accounts, 1.0, key="alice")
        accounts.set_key_budgets([alice])
        assert spent(accounts) == [1.04]


async def test_a_refusal_says_whether_the_budget_lets_pass_to_others(
    tmp_path: Path, now: Now
) -> None:
    budgets = (
        {"provider": "cloud", "day": 0.01, "when_spent": "free"},
        {"key": "alice", "day": 0.01, "when_spent": "refuse"},
    )
    async with started(tmp_path, now, *budgets) as accounts:
        spend(accounts, 0.01)
        with pytest.raises(BudgetExceeded) as refused:
            reserve(accounts)
        assert refused.value.free
        reserve(accounts, "local")
        reserve(accounts, "gift", "alice")
        spend(accounts, 0.01, "other", "alice")
        with pytest.raises(BudgetExceeded) as refused:
            reserve(accounts, key="alice")
        assert not refused.value.free


async def test_a_machine_that_costs_counts_for_keys_and_for_all_but_no_provider(
    tmp_path: Path, now: Now
) -> None:
    budgets = ({"month": 1.0}, {"key": "alice", "month": 1.0}, {"provider": "cloud", "month": 1.0})
    costs = {"price_per_hour": 3.6, "compare": {"generate": "other"}}
    async with started(tmp_path, now, *budgets, costs=costs) as accounts:
        assert not accounts.is_free(model(accounts, "local"))
        charge = reserve(accounts, "local", "alice").settle(
            Usage(output_tokens=50 * CENT), 100.0, served=True
        )
        assert [charge.cost, charge.saved] == pytest.approx([0.1, 0.4])
        assert spent(accounts) == [0.1, 0.1, 0.0]
        failed = reserve(accounts, "local").settle(Usage(output_tokens=CENT), 10.0, served=False)
        assert failed.saved == pytest.approx(-0.01)
        assert accounts.price(model(accounts, "local"), request()) == pytest.approx(0.1)
        spend(accounts, 1.0)
        with pytest.raises(BudgetExceeded):
            reserve(accounts, "local")


async def test_what_is_free_is_always_admitted_and_what_is_unknown_is_not(
    tmp_path: Path, now: Now
) -> None:
    async with started(tmp_path, now, {"day": 0.0}) as accounts:
        free = {name: accounts.is_free(model(accounts, name)) for name in ("local", "gift")}
        assert free == {"local": True, "gift": True}
        reserve(accounts, "local")
        reserve(accounts, "gift")
        assert not accounts.is_free(model(accounts, "unknown"))
        assert accounts.price(model(accounts, "unknown"), request()) == float("inf")
        with pytest.raises(BudgetExceeded):
            reserve(accounts, "unknown")


@pytest.mark.parametrize(
    ("reported", "cost"), [(0.5, 0.5), (0.0, 0.0), (float("nan"), 0.01), (-1.0, 0.01)]
)
async def test_what_the_provider_says_goes_before_the_tables(
    tmp_path: Path, now: Now, reported: float, cost: float
) -> None:
    async with started(tmp_path, now) as accounts:
        usage = Usage(output_tokens=CENT, price=reported)
        assert reserve(accounts).settle(usage, served=True).cost == cost


async def test_a_second_settlement_changes_nothing(tmp_path: Path, now: Now) -> None:
    async with started(tmp_path, now, {"day": 1.0}) as accounts:
        reservation = reserve(accounts)
        first = reservation.settle(Usage(output_tokens=CENT), served=False)
        assert reservation.settle(Usage(output_tokens=9 * CENT), served=True) == first
        assert spent(accounts) == [0.01]


async def test_expected_prices_learn_from_what_was_seen(tmp_path: Path, now: Now) -> None:
    async with started(tmp_path, now) as accounts:
        worst = request(tokens=100 * CENT)
        for _ in range(50):
            reserve(accounts).settle(Usage(input_tokens=5, output_tokens=CENT), served=True)
        assert accounts.price(model(accounts), worst) == pytest.approx(0.01)
    async with started(tmp_path, now) as accounts:
        assert accounts.price(model(accounts), worst) == pytest.approx(0.01)


async def test_each_level_is_told_once_a_period(
    tmp_path: Path, now: Now, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[BudgetWarning] = []
    async with started(tmp_path, now, {"day": 1.0}, on_warning=told.append) as accounts:
        for _ in range(20):
            spend(accounts, 0.05)
        assert [warning.level for warning in told] == [80, 90, 100]
        now.at += 24 * HOUR_S
        spend(accounts, 0.95)  # only the highest
        assert [warning.level for warning in told[3:]] == [90]
    text = "90% of the budget of this server for this day are spent: $0.95 of $1.00"
    assert told[-1].text == text
    assert text in caplog.text


def test_days_and_months_end_in_utc() -> None:
    new_year = datetime(2026, 12, 31, 23, 59, tzinfo=UTC).timestamp()
    assert (period("day", new_year), period("month", new_year)) == ("2026-12-31", "2026-12")
    assert end("day", new_year) == end("month", new_year) == new_year + 60
    leap = datetime(2028, 2, 1, tzinfo=UTC).timestamp()
    assert end("month", leap) == leap + 29 * 24 * HOUR_S


class Receiver(BaseHTTPRequestHandler):
    """Answers as the server's list says, then with 204."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        server: Any = self.server
        server.got.append((self.path, json.loads(body)))
        status = server.answers.pop(0) if server.answers else 204
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()
        server.answered.release()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers, server.answered = [], [], threading.Semaphore(0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def answered(receiver: Any, times: int) -> None:
    for _ in range(times):
        assert await asyncio.to_thread(receiver.answered.acquire, timeout=30)


async def test_a_webhook_is_told_with_retries_and_its_address_stays_secret(
    tmp_path: Path, now: Now, receiver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"http://127.0.0.1:{receiver.server_port}/hook/verysecret"
    receiver.answers = [500, 429, 204, 302, 404]
    budget = {"provider": "cloud", "month": 1.0, "webhook": url}
    webhook = Webhook(delays_s=(0.0, 0.0))
    async with started(tmp_path, now, budget, webhook=webhook) as accounts:
        spend(accounts, 0.8)
        await answered(receiver, 3)
        spend(accounts, 0.1)  # redirected: not followed
        spend(accounts, 0.1)  # refused: not tried again
        await answered(receiver, 2)
    assert {path for path, _ in receiver.got} == {"/hook/verysecret"}
    assert [document["level"] for _, document in receiver.got] == [80, 80, 80, 90, 100]
    first = receiver.got[0][1]
    assert (first["type"], first["provider"], first["period"]) == ("budget", "cloud", "month")
    assert (first["spent"], first["limit"]) == (pytest.approx(0.8), 1.0)
    assert "80%" in first["text"]
    assert "verysecret" not in caplog.text
    assert len(re.findall("was not told", caplog.text)) == 2


async def test_a_webhook_that_nobody_answers_holds_nothing_up(tmp_path: Path, now: Now) -> None:
    budget = {"day": 1.0, "webhook": "http://127.0.0.1:9/"}
    webhook = Webhook(delays_s=(0.0,))
    async with started(tmp_path, now, budget, webhook=webhook) as accounts:
        for _ in range(200):
            spend(accounts, 0.9)
            now.at += 24 * HOUR_S


@pytest.mark.parametrize("name", ["day", "month"])
def test_no_budget_is_infinite(name: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        BudgetConfig.model_validate({name: float("inf")})
