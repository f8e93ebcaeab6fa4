"""The parts of the runtime that need no network: breaker, limits, latency, key, address, events."""

from __future__ import annotations

import itertools
import os
import struct
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from engine.errors import LoadFailed
from engine.runtimes.remote.address import Address, is_named_literally, is_private
from engine.runtimes.remote.breaker import (
    FAILURES_IN_A_ROW,
    FIRST_OPEN_S,
    LEAST_CALLS,
    WINDOW_S,
    Breaker,
    BreakerState,
)
from engine.runtimes.remote.counts import dollars, token_count
from engine.runtimes.remote.latency import LEAST_SAMPLES, Latency
from engine.runtimes.remote.rate_limits import MOST_BELIEVED_S, RateLimits, retry_after_s
from engine.runtimes.remote.secret import Secret
from engine.runtimes.remote.server_events import EventReader
from engine.runtimes.remote.wav import NotWav, SampleReader
from tests.engine.runtimes.remote.conftest import Clock


class TestBreaker:
    def state(self, breaker: Breaker) -> BreakerState:
        return breaker.state  # the type checker would take it for a constant

    def fail(self, breaker: Breaker, times: int = 1) -> None:
        for _ in range(times):
            passage = breaker.let_through()
            assert passage is not None
            passage.failed()

    def test_failures_in_a_row_open_it_and_an_answered_probe_closes_it(self) -> None:
        clock = Clock()
        breaker = Breaker(clock)
        self.fail(breaker, FAILURES_IN_A_ROW - 1)
        assert self.state(breaker) is BreakerState.CLOSED
        self.fail(breaker)
        assert self.state(breaker) is BreakerState.OPEN
        assert breaker.let_through() is None
        assert breaker.refused_s == FIRST_OPEN_S
        clock.now += FIRST_OPEN_S
        assert self.state(breaker) is BreakerState.HALF_OPEN
        probe = breaker.let_through()
        assert probe is not None and breaker.let_through() is None, "one probe at a time"
        probe.answered()
        assert self.state(breaker) is BreakerState.CLOSED
        probe.succeeded()
        assert breaker.let_through() is not None

    def test_a_success_between_begins_the_row_anew(self) -> None:
        breaker = Breaker(Clock())
        self.fail(breaker, FAILURES_IN_A_ROW - 1)
        passage = breaker.let_through()
        assert passage is not None
        passage.succeeded()
        self.fail(breaker, FAILURES_IN_A_ROW - 1)
        assert self.state(breaker) is BreakerState.CLOSED

    def test_a_failed_probe_opens_it_for_longer(self) -> None:
        clock = Clock()
        breaker = Breaker(clock)
        self.fail(breaker, FAILURES_IN_A_ROW)
        clock.now += FIRST_OPEN_S
        self.fail(breaker)
        assert breaker.refused_s == 2 * FIRST_OPEN_S

    def test_an_abandoned_probe_leaves_its_place_to_another(self) -> None:
        clock = Clock()
        breaker = Breaker(clock)
        self.fail(breaker, FAILURES_IN_A_ROW)
        clock.now += FIRST_OPEN_S
        probe = breaker.let_through()
        assert probe is not None
        probe.abandoned()
        assert breaker.let_through() is not None

    def test_a_failure_rate_opens_it(self) -> None:
        breaker = Breaker(Clock())
        for number in range(LEAST_CALLS):
            passage = breaker.let_through()
            assert passage is not None, number
            passage.failed() if number % 2 else passage.succeeded()
        assert breaker.error_rate == 0.5
        assert self.state(breaker) is BreakerState.OPEN

    def test_old_failures_do_not_count(self) -> None:
        clock = Clock()
        breaker = Breaker(clock)
        for _ in range(FAILURES_IN_A_ROW - 1):
            self.fail(breaker)
        clock.now += WINDOW_S + 1
        assert breaker.error_rate is None

    def test_a_late_failure_of_an_earlier_call_does_not_move_the_probe(self) -> None:
        clock = Clock()
        breaker = Breaker(clock)
        late = breaker.let_through()
        self.fail(breaker, FAILURES_IN_A_ROW)
        clock.now += FIRST_OPEN_S
        probe = breaker.let_through()
        assert late is not None and probe is not None
        late.failed()
        assert self.state(breaker) is BreakerState.HALF_OPEN
        assert breaker.let_through() is None, "the probe is still out"
        probe.answered()
        assert self.state(breaker) is BreakerState.CLOSED


class TestRateLimits:
    def test_requests_of_a_minute(self) -> None:
        clock = Clock()
        limits = RateLimits(2, None, clock)
        limits.take(0)
        clock.now += 10
        limits.take(0)
        assert limits.wait_s(0) == 50
        assert limits.left.requests == 0
        clock.now += 50
        assert limits.wait_s(0) == 0

    def test_tokens_of_a_minute_are_corrected_afterwards(self) -> None:
        clock = Clock()
        limits = RateLimits(None, 100, clock)
        taken = limits.take(90)
        assert limits.wait_s(20) == 60
        taken.tokens = 30
        assert limits.wait_s(20) == 0
        assert limits.left.tokens == 70

    def test_a_request_beyond_the_limit_runs_when_the_minute_is_empty(self) -> None:
        clock = Clock()
        limits = RateLimits(None, 100, clock)
        assert limits.wait_s(1000) == 0
        limits.take(1000)
        assert limits.wait_s(1000) == 60

    def test_headers_that_say_0_keep_requests_back(self) -> None:
        clock = Clock()
        limits = RateLimits(None, None, clock)
        limits.read(
            {
                "x-ratelimit-remaining-requests": "7",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6.5s",
            }
        )
        assert (limits.left.requests, limits.left.tokens) == (7, 0)
        assert limits.wait_s(1) == 6.5
        limits.read({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2h3m"})
        assert limits.wait_s(1) == MOST_BELIEVED_S

    @pytest.mark.parametrize(
        ("text", "seconds"), [("7", 7), ("0.5", 0.5), ("soon", None), ("-1", None), ("nan", None)]
    )
    def test_retry_after(self, text: str, seconds: float | None) -> None:
        assert retry_after_s({"retry-after": text}) == seconds

    def test_retry_after_as_a_date_and_in_milliseconds(self) -> None:
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
        found = retry_after_s({"retry-after": later})
        assert found is not None and 30 < found <= 90
        assert retry_after_s({"retry-after": "9", "retry-after-ms": "250"}) == 0.25
        assert retry_after_s({}) is None


def test_the_timeout_follows_the_95th_percentile() -> None:
    latency = Latency()
    assert latency.timeout_s(1, 60) == 60, "nothing is known"
    for number in range(LEAST_SAMPLES * 10):
        latency.add(2.0 if number % 100 < 96 else 30.0)
    assert latency.timeout_s(1, 60) == 3.0
    assert latency.timeout_s(5, 60) == 5.0, "the floor"
    for _ in range(20):
        latency.add(50.0)
    assert latency.timeout_s(1, 60) == 60.0, "the ceiling"


class TestSecret:
    def test_a_file_is_read_again_when_it_changes(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("sk-first\n")
        secret = Secret(SecretStr(f"file:{path}"))
        assert secret.read() == "sk-first"
        path.write_text("sk-second-one\n")
        assert secret.read() == "sk-second-one"
        assert secret.hide("no sk-first, no sk-second-one") == "no [key], no [key]"

    def test_within_a_tick_of_its_time_it_is_read_when_asked(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("sk-first")
        secret = Secret(SecretStr(f"file:{path}"))
        secret.read()
        found = path.stat()
        path.write_text("sk-other")
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert secret.read() == "sk-first"
        assert secret.read(again=True) == "sk-other"

    def test_a_file_that_is_being_replaced_leaves_the_last_key(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("sk-first")
        secret = Secret(SecretStr(f"file:{path}"))
        secret.read()
        path.unlink()
        assert secret.read() == "sk-first"

    def test_a_missing_key_is_named_and_never_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        with pytest.raises(LoadFailed, match="the variable NO_SUCH_KEY holds no key"):
            Secret(SecretStr("env:NO_SUCH_KEY")).read()
        with pytest.raises(LoadFailed, match=r"the file .*/absent cannot be read"):
            Secret(SecretStr(f"file:{tmp_path}/absent")).read()
        monkeypatch.setenv("NO_SUCH_KEY", "two\nlines")
        with pytest.raises(LoadFailed) as raised:
            Secret(SecretStr("env:NO_SUCH_KEY")).read()
        assert "two" not in str(raised.value)
        secret = Secret(SecretStr("sk-literal"))
        assert "sk-literal" not in repr(secret)


class TestAddress:
    @pytest.mark.parametrize(
        ("source", "url"),
        [
            ("https://api.example.com/v1", "https://api.example.com/v1/chat/completions"),
            ("https://api.example.com/v1/", "https://api.example.com/v1/chat/completions"),
            (
                "https://a.example.com:8443/openai/deployments/x?api-version=2024-10-21",
                "https://a.example.com:8443/openai/deployments/x/chat/completions"
                "?api-version=2024-10-21",
            ),
        ],
    )
    def test_endpoints_stand_below_it(self, source: str, url: str) -> None:
        assert Address.of(source).join("/chat/completions") == url

    @pytest.mark.parametrize(
        "source",
        [
            "api.example.com/v1",
            "ftp://api.example.com",
            "https://user:word@api.example.com/v1",
            "https://api.example.com/v1?key=sk-secret",
            "https://api.example.com/v1#x",
            "https://api.example.com:port/v1",
            "https://a b/v1",
        ],
    )
    def test_what_is_none_is_refused(self, source: str) -> None:
        with pytest.raises(ValueError) as raised:
            Address.of(source)
        assert "; " not in str(raised.value), "the configuration's errors are cut there"

    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0",
            "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
        ],
    )  # fmt: skip
    def test_private(self, address: str) -> None:
        assert is_private(address)

    @pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
    def test_public(self, address: str) -> None:
        assert not is_private(address)

    def test_named_literally(self) -> None:
        assert is_named_literally("localhost") and is_named_literally("10.0.0.1")
        assert is_named_literally("::1") and not is_named_literally("ollama")


STREAM = (
    ": hello\n\ndata: one\n\nevent: two\r\ndata: 2ä\r\ndata: b\r\n\r\ndata:three\r\r\ndata: last"
)


class TestEvents:
    def read(self, *chunks: bytes) -> list[tuple[str | None, str]]:
        reader = EventReader()
        events = [event for chunk in chunks for event in reader.feed(chunk)]
        return [(event.data, event.text()) for event in [*events, *reader.end()]]

    WHOLE = (
        (None, ": hello\n\n"),
        ("one", "data: one\n\n"),
        ("2ä\nb", "event: two\ndata: 2ä\ndata: b\n\n"),
        ("three", "data:three\n\n"),
        ("last", "data: last\n\n"),
    )

    @given(st.sets(st.integers(0, len(STREAM.encode()))))
    def test_however_the_bytes_are_cut(self, cuts: set[int]) -> None:
        raw = STREAM.encode()
        places = [0, *sorted(cuts), len(raw)]
        chunks = [raw[begin:end] for begin, end in itertools.pairwise(places)]
        assert tuple(self.read(*chunks)) == self.WHOLE

    @pytest.mark.parametrize("piece", [b"x" * 2**14, b"data: x\n" * 2**11])
    def test_a_long_event_may_come_in_many_pieces(self, piece: bytes) -> None:
        reader = EventReader()
        reader.feed(b"data: ")
        for _ in range(2**8):
            assert not reader.feed(piece)
        assert reader.held_chars == 6 + len(piece) * 2**8
        (event,) = reader.feed(b"\n\ndata: y\n")
        assert len(event.data or "") > 2**19 and reader.held_chars == 8

    def test_other_data_leave_the_other_lines(self) -> None:
        (event,) = EventReader().feed(b"event: a\ndata: 1\ndata: 2\nid: 3\n\n")
        assert event.text("new") == "event: a\ndata: new\nid: 3\n\n"


@pytest.mark.parametrize("value", [-1, True, 1.5, "3", None, 10**23, float("nan")])
def test_what_is_no_count_of_tokens(value: object) -> None:
    assert token_count(value) is None


@pytest.mark.parametrize("value", [-0.1, True, "3", None, 1e300, float("nan"), float("inf")])
def test_what_is_no_price(value: object) -> None:
    assert dollars(value) is None


class TestWav:
    SAMPLES = np.arange(-1000, 1000, 20, dtype="<i2")

    def file(self, channels: int = 1, size: int | None = None) -> bytes:
        data = np.repeat(self.SAMPLES, channels).tobytes()
        form = struct.pack("<HHIIHH", 1, channels, 16_000, 32_000 * channels, 2 * channels, 16)
        chunks = b"fmt " + struct.pack("<I", 16) + form + b"LIST" + struct.pack("<I", 3) + b"abc\0"
        length = len(data) if size is None else size
        return b"RIFF\xff\xff\xff\xffWAVE" + chunks + b"data" + struct.pack("<I", length) + data

    @pytest.mark.parametrize("step", [1, 7, 64, 10_000])
    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF])
    def test_samples_come_however_the_bytes_are_cut(
        self, step: int, channels: int, size: int | None
    ) -> None:
        raw, reader = self.file(channels, size), SampleReader(None)
        found = [reader.feed(raw[begin : begin + step]) for begin in range(0, len(raw), step)]
        assert reader.rate == 16_000 and not reader.lacks
        np.testing.assert_allclose(np.concatenate(found), self.SAMPLES / 32768.0)

    def test_what_follows_the_samples_is_left_out(self) -> None:
        reader = SampleReader(None)
        samples = reader.feed(self.file() + b"LIST\4\0\0\0abcd")
        assert len(samples) == len(self.SAMPLES)

    def test_a_missing_end_is_noticed(self) -> None:
        reader = SampleReader(None)
        reader.feed(self.file()[:-10])
        assert reader.lacks

    @pytest.mark.parametrize("raw", [b"ID3" + bytes(50), b"RIFF0000WAVEdata" + bytes(20)])
    def test_other_formats_are_refused(self, raw: bytes) -> None:
        with pytest.raises(NotWav):
            SampleReader(None).feed(raw)

    def test_bare_pcm(self) -> None:
        reader = SampleReader(24_000)
        samples = np.concatenate([reader.feed(b"\0"), reader.feed(b"\x40\0\x80")])
        assert samples.tolist() == [0.5, -1.0]
