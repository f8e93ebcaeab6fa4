"""Token buckets, requests at once, and OpenAI's words for them."""

from __future__ import annotations

import pytest

from server.keys.limiter import Limiter, Limits, Refusal, Turn, format_reset


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(limiter: Limiter) -> Refusal:
    refusal = limiter.enter()
    assert refusal is not None
    return refusal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (60, "1m0s"),
        (179.56, "2m59.56s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90_061.5, "25h1m1.5s"),
    ],
)
def test_a_reset_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert format_reset(seconds) == text


def test_requests_come_back_at_the_pace_of_the_limit(clock: Clock) -> None:
    limiter = Limiter(Limits(requests_per_minute=60), clock)
    assert [limiter.enter() for _ in range(60)] == [None] * 60
    clock.now += 0.25
    refusal = refused(limiter)
    assert refusal.retry_after_s == pytest.approx(0.75)
    assert "60 requests a minute" in refusal.message
    clock.now += 0.75
    assert limiter.enter() is None
    assert limiter.enter() is not None
    clock.now += 3600
    assert [limiter.enter() for _ in range(61)].count(None) == 60


def test_tokens_may_be_owed_and_are_paid_back_by_waiting(clock: Clock) -> None:
    limiter = Limiter(Limits(tokens_per_minute=100), clock)
    assert limiter.enter() is None
    limiter.count_tokens(99)
    assert limiter.enter() is None
    limiter.count_tokens(151)
    refusal = refused(limiter)
    assert refusal.retry_after_s == pytest.approx(90)
    assert "100 tokens a minute" in refusal.message
    assert limiter.headers() == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "2m30s",
    }
    clock.now += 89
    assert limiter.enter() is not None
    clock.now += 1.1
    assert limiter.enter() is None


def test_what_is_refused_takes_nothing(clock: Clock) -> None:
    limits = Limits(requests_per_minute=2, tokens_per_minute=10, concurrent=1)
    limiter = Limiter(limits, clock)
    assert limiter.enter() is None
    for _ in range(5):
        assert "at once" in refused(limiter).message
    limiter.leave()
    limiter.count_tokens(10)
    for _ in range(5):
        assert "tokens" in refused(limiter).message
    assert limiter.running == 0
    assert limiter.headers()["x-ratelimit-remaining-requests"] == "1"
    assert limiter.headers()["x-ratelimit-reset-requests"] == "30s"


def test_a_turn_is_given_back_once(clock: Clock) -> None:
    limiter = Limiter(Limits(concurrent=1), clock)
    first, second = Turn(limiter), Turn(limiter)
    assert first.enter() is None
    assert second.enter() == Refusal(
        "Rate limit reached: 1 requests of this key run at once, as many as it may have.", 1.0
    )
    second.leave()
    assert limiter.running == 1
    first.leave()
    first.leave()
    assert limiter.running == 0
    assert first.headers() == {}


def test_other_limits_forget_nothing_that_was_used(clock: Clock) -> None:
    limiter = Limiter(Limits(requests_per_minute=10, concurrent=9), clock)
    for _ in range(8):
        limiter.enter()
    limiter.set(Limits(requests_per_minute=20, tokens_per_minute=5, concurrent=8))
    assert "at once" in refused(limiter).message
    assert limiter.headers()["x-ratelimit-remaining-requests"] == "12"
    assert limiter.headers()["x-ratelimit-remaining-tokens"] == "5"
    limiter.set(Limits(requests_per_minute=4))
    assert "4 requests a minute" in refused(limiter).message
    limiter.set(Limits())
    assert limiter.enter() is None
    assert limiter.headers() == {}
    assert limiter.running == 9
