"""`roundhouse bench`: its statistics, its client against wrong servers, its report, a real run."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from engine.runtimes.vllm.options import VllmOptions
from server.bench import plot, report
from server.bench.errors import BadSetUp, InvalidRun, NotStarted
from server.bench.exchange import BadAnswer, Exchange, events, exchange, read_response
from server.bench.figures import Comparison, Figure, Spread, quantile, round_order
from server.bench.http_caller import HttpCaller, read_answer
from server.bench.memory import memory_of, read_file_pages, read_rollup
from server.bench.processor import ProcessorTime
from server.bench.runner import Result as Measured
from server.bench.runner import round_count, run
from server.bench.scenarios import SCENARIOS
from server.bench.scenarios.llm import Llm, completion
from server.bench.scenarios.scenario import Case, Scenario, Settings
from server.bench.set_up import SetUp, choose_models, read_overrides
from server.bench.target_commands import ours, vllm_serve
from server.bench.targets import Command, Server, Target
from server.bench.work import COMPLETIONS, Answer, Answers, Round, Streams, Work
from server.commands import cli
from server.settings import load_settings
from tests.http_thread import running
from tests.server.real import ROOT
from tests.server.real import Server as RealServer

MACHINE: dict[str, Any] = {
    "date": "2026-11-21 10:00 UTC",
    "commit": "abc1234",
    "cpu": "A Processor",
    "cores": 2,
    "memory_bytes": 24 * 2**30,
    "gpus": [],
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "omp_num_threads": None,
}


class TestFigures:
    @pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.95, 0.99, 1])
    def test_quantiles_are_those_of_numpy(self, share: float) -> None:
        values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))

    def test_no_values_have_no_quantile(self) -> None:
        assert math.isnan(quantile([], 0.5))

    def test_spread(self) -> None:
        spread = Spread.of([1, 2, 3, 4, 5])
        assert (spread.median, spread.q1, spread.q3, spread.iqr) == (3, 2, 4, 2)

    def test_the_ratio_is_the_median_of_those_of_the_pairs(self) -> None:
        """A machine that gets slower touches both of a pair; the medians alone would say 1.5."""
        compared = Comparison.of(Figure("f", ""), ours=[200, 30, 20], peer=[100, 20, 10])
        assert (compared.ours.median, compared.peer.median) == (30, 20)
        assert compared.ratio.median == 2
        assert not compared.noisy

    @pytest.mark.parametrize(
        ("ours", "noisy"), [([110, 120, 130], False), ([90, 110, 130], True), ([100] * 3, False)]
    )
    def test_a_spread_wider_than_the_effect_is_noise(self, ours: list[float], noisy: bool) -> None:
        assert Comparison.of(Figure("f", ""), ours, [100, 100, 100]).noisy is noisy

    def test_ratios_to_zero_show_nothing(self) -> None:
        compared = Comparison.of(Figure("f", ""), [1.0] * 4, [0.0, 1.0, 0.0, 0.0])
        assert (compared.ratio.median, compared.ratio.q3) == (math.inf, math.inf)
        assert compared.noisy

    def test_rounds_go_a_b_b_a(self) -> None:
        assert [target for pair in round_order(3) for target in pair] == [0, 1, 1, 0, 0, 1]


def chunked(*pieces: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def cut(data: bytes, step: int) -> Exchange:
    """As if read in pieces of `step` bytes, one a second."""
    pieces = [data[place : place + step] for place in range(0, len(data), step)]
    return Exchange(0.0, tuple((float(at), piece) for at, piece in enumerate(pieces)))


class TestExchange:
    SSE = (b'data: {"a": 1}\n\n', b"da", b'ta: {"b": 2}\n\ndata: [DONE]\n', b"\n")

    @pytest.mark.parametrize("step", range(1, 60))
    def test_chunks_cut_anywhere(self, step: int) -> None:
        response = read_response(cut(chunked(*self.SSE), step))
        assert response.status == 200
        assert response.body == b"".join(self.SSE)
        assert [data for _, data in events(response)] == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]

    def test_an_event_is_there_with_its_last_byte(self) -> None:
        whole = chunked(*self.SSE)
        response = read_response(cut(whole, 1))
        times = {data: at_s for at_s, data in events(response)}
        assert times[b'{"a": 1}'] == whole.index(b"\n\n")
        assert times[b'{"b": 2}'] == whole.index(b"2}\n") + 2

    @pytest.mark.parametrize("missing", range(1, 40))
    def test_chunks_that_break_off(self, missing: int) -> None:
        whole = chunked(*self.SSE)
        with pytest.raises(BadAnswer, match="broke off"):
            read_response(cut(whole[:-missing], 7) if missing > 2 else cut(whole[:-10], 7))

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"", "closed without an answer"),
            (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
            (b"HTTP/1.1 200 OK\r\n", "no HTTP"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour", "broke off"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nword\r\n", "not chunked"),
        ],
    )
    def test_what_is_no_answer(self, data: bytes, said: str) -> None:
        with pytest.raises(BadAnswer, match=said):
            read_response(cut(data, 1000))

    def test_without_a_length_the_end_of_the_connection_is_the_end(self) -> None:
        assert read_response(cut(b"HTTP/1.0 200 OK\r\n\r\nall", 4)).body == b"all"

    async def test_nobody_there(self) -> None:
        request = httpx.Request("GET", "http://127.0.0.1:9/")
        request.read()
        with pytest.raises(BadAnswer, match="connection failed"):
            read_response(await exchange(request, 10))


class Handler(http.server.BaseHTTPRequestHandler):
    """A server that is wrong in the way its model's name says."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        turn = len(self.asked)
        wrong = body["model"].removeprefix("sometimes-")
        if wrong != body["model"] and turn % 2:
            wrong = "good"
        if wrong == "status":
            self._send(500, b'{"error": {"message": "the model fell over"}}')
            return
        frames = [self._frame(text="a"), self._frame(text="bc")]
        if wrong == "error":
            frames.append(b'data: {"error": {"message": "out of coal"}}\n\n')
        if wrong not in ("error", "no-end"):
            frames.append(self._frame(text="", finish_reason="length", tokens=3))
        if wrong == "not-json":
            frames[1] = b"data: {oops\n\n"
        whole = b"".join(frames)
        self._send(200, whole[:-20] if wrong == "breaks" else whole, length=len(whole))

    def _send(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    @staticmethod
    def _frame(text: str, finish_reason: str | None = None, tokens: int = 0) -> bytes:
        document: dict[str, Any] = {"choices": [{"text": text, "finish_reason": finish_reason}]}
        if tokens:
            document["usage"] = {"completion_tokens": tokens}
        return b"data: " + json.dumps(document).encode() + b"\n\n"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def wrong_server() -> Iterator[str]:
    Handler.asked.clear()
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


async def ask(url: str, model: str) -> Answer:
    (answer,) = (await HttpCaller(url).call([[completion(model, "hello", 3)]])).each
    return answer


class TestHttpCaller:
    async def test_a_good_stream(self, wrong_server: str) -> None:
        answer = await ask(wrong_server, "good")
        assert answer.error is None
        assert (answer.output, answer.tokens) == ("abc", 3)
        assert 0 < answer.first_s <= answer.end_s
        assert Handler.asked[0]["ignore_eos"] and Handler.asked[0]["max_tokens"] == 3

    async def test_what_one_read_brings_is_one_piece(self) -> None:
        """A gap of 0 between two tokens would be none of the server's."""

        def frame(text: str) -> bytes:
            choice = {"text": text, "finish_reason": "length" if text == "c" else None}
            return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

        whole = b"HTTP/1.1 200 OK\r\n\r\n" + frame("a")
        seen = Exchange(5.0, ((0.1, whole), (0.3, frame("b") + frame("c"))))
        answer = read_answer(completion("any", "hello", 3), seen)
        assert (answer.sent_s, answer.end_s, answer.times_s) == (5.0, 0.3, (0.1, 0.3))
        assert (answer.output, answer.tokens) == ("abc", 3)

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            ("status", "status 500: .*fell over"),
            ("error", "out of coal"),
            ("breaks", "broke off"),
            ("no-end", "ended without saying so"),
            ("not-json", "not understood"),
        ],
    )
    async def test_what_goes_wrong_is_named(self, wrong_server: str, model: str, said: str) -> None:
        answer = await ask(wrong_server, model)
        assert answer.error is not None
        with pytest.raises(BadAnswer, match=said):
            raise BadAnswer(answer.error)

    async def test_a_server_that_never_ends(self) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until the client gives up
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            caller = HttpCaller(url, timeout_s=0.05)
            (answer,) = (await caller.call([[completion("any", "hello", 3)]])).each
        assert answer.error == "no end within 0.05 s"

    async def test_the_key_is_sent_and_v1_is_not_doubled(self) -> None:
        seen: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/"
            await HttpCaller(url, "secret").call([[completion("any", "hello", 3)]])
        head = (await seen).decode()
        assert head.startswith(f"POST {COMPLETIONS} HTTP/1.1\r\n")
        assert "authorization: Bearer secret" in head.lower().replace("bearer", "Bearer")


def answered(sent_s: float, *times_s: float, tokens: int = 0) -> Answer:
    return Answer(sent_s, times_s[-1], times_s, tokens or len(times_s))


@pytest.mark.slow
class TestScenarios:
    def test_figures_of_text(self) -> None:
        llm = Llm(["m"], Settings())
        round_ = Round(
            (
                answered(10.0, 0.1, 0.2, 0.4, tokens=6),
                answered(10.5, 0.3, 0.5),
                Answer(0.0, 99.0, error="broken"),
            ),
            client_cpu_s=0.25,
        )
        figures = llm.measure(round_)
        assert round_.wall_s == pytest.approx(1.0)
        assert figures["tokens"] == pytest.approx(8)
        assert figures["TTFT p50"] == pytest.approx(200)
        assert figures["ITL p50"] == pytest.approx(200)
        assert figures["tokens a piece"] == pytest.approx(8 / 5)
        assert figures["client CPU"] == pytest.approx(25)

    def test_an_event_with_each_token_is_asked_for_if_wanted(self) -> None:
        for single in (False, True):
            llm = Llm(["m"], Settings(streams=(1,), single_tokens=single))
            ((work, *_),) = llm.streams(llm.cases()[0], 0)
            assert work.body.get("stream_interval") == (1 if single else None)

    def test_no_prompt_is_sent_twice(self) -> None:
        llm = Llm(["m"], Settings(streams=(2, 3)))
        prompts = [work.body["prompt"] for work in llm.samples()]
        for case in llm.cases():
            for seed in range(3):
                prompts += [w.body["prompt"] for series in llm.streams(case, seed) for w in series]
        assert len(set(prompts)) == len(prompts)

    def test_answers_that_are_alike(self) -> None:
        def alike(name: str, ours: str, peer: str) -> bool:
            return SCENARIOS[name](SCENARIOS[name].models, Settings()).alike(ours, peer)

        def picture(*levels: int) -> str:
            return base64.b64encode(bytes(levels)).decode()

        assert alike("llm", "a", "a") and not alike("llm", "a", "a ")
        assert alike("images", picture(9, 0), picture(10, 1))
        assert not alike("images", picture(9, 255), picture(9, 0))
        assert not alike("images", picture(9), picture(9, 9))
        assert alike("speech", "1.0", "1.0005") and not alike("speech", "1.0", "1.01")
        assert alike("transcription", "word", " word") and not alike("transcription", "a", "b")

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_both_targets_of_a_pair_are_asked_the_same(self, name: str) -> None:
        scenario = SCENARIOS[name](SCENARIOS[name].models, Settings())
        for case in scenario.cases():
            assert scenario.streams(case, 5) == scenario.streams(case, 5)
            assert all(scenario.streams(case, 5))

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_what_is_measured_is_what_was_announced(self, name: str) -> None:
        scenario = SCENARIOS[name](SCENARIOS[name].models, Settings())
        answers = tuple(Answer(0.0, 1.0, (0.5, 1.0), 2, audio_s=2.0) for _ in range(4))
        round_ = Round(answers, 0.1, first_token_s=1.0, memory=memory_of(os.getpid()))
        assert list(scenario.measure(round_)) == [each.name for each in scenario.figures]

    def test_the_second_of_two_finds_its_model(self) -> None:
        swap = SCENARIOS["swap"](["a", "b"], Settings(requests=2))
        (series,) = swap.streams(swap.cases()[0], 0)
        assert [work.body["model"] for work in series] == ["a", "a", "b", "b"]
        figures = swap.measure(
            Round(tuple(answered(0.0, each) for each in (0.5, 0.1, 0.7, 0.3)), 0.0)
        )
        assert figures == pytest.approx({"TTFT with a swap": 600, "TTFT without": 200, "swap": 400})


class Fixed(Target):
    """A target that answers at once, `wall_s` after it was asked."""

    def __init__(
        self, name: str, log: list[str], walls_s: Sequence[float], says: str = "x"
    ) -> None:
        self.name, self.environment, self.command = name, {}, ("start", name)
        self.caller = self
        self._log, self._walls_s, self._says = log, iter(walls_s), says

    async def start(self) -> None:
        self._log.append(f"{self.name} up")

    async def stop(self) -> None:
        self._log.append(f"{self.name} down")

    async def call(self, streams: Streams) -> Answers:
        self._log.append(self.name)
        wall_s = next(self._walls_s)
        error = "it broke" if wall_s < 0 else None
        answer = Answer(0.0, wall_s, (wall_s,), 10, output=self._says, error=error)
        return Answers([answer] * sum(map(len, streams)), 0.0)


class Plain(Scenario):
    name = "plain"
    figures = (
        Figure("time", "s"),
        Figure("rate", "/s", higher_is_better=True),
        Figure("turns", "", higher_is_better=None),
    )
    models = ("any",)

    def streams(self, case: Case, seed: int) -> Streams:
        return [[Work(COMPLETIONS, {"model": "any", "seed": seed})]]

    def measure(self, round_: Round) -> Mapping[str, float]:
        return {"time": round_.wall_s, "rate": 1 / round_.wall_s, "turns": 1}

    def samples(self) -> Sequence[Work]:
        return [Work(COMPLETIONS, {})]


def measured(
    ours: Sequence[float], peer: Sequence[float] | None, repeats: int, **says: str
) -> tuple[Measured, list[str]]:
    """The walls of both targets: of the sample if there are two, of the warm-up, of each round."""
    log: list[str] = []
    targets: list[Target] = [Fixed("ours", log, ours)]
    if peer is not None:
        targets.append(Fixed("peer", log, peer, **says))
    told: list[str] = []
    plain = Plain(["any"], Settings())
    result = asyncio.run(run(plain, targets, repeats, told.append))
    starts = [each for each in told if each.endswith(": starting")]
    assert len(told) - len(starts) <= round_count(plain, len(targets), repeats)
    return result, log


class TestRunner:
    def test_order(self) -> None:
        _, log = measured([1] * 5, [1] * 5, repeats=3)
        samples, warm_up = ["ours", "peer"], ["ours", "peer"]
        counted = ["ours", "peer", "peer", "ours", "ours", "peer"]
        assert log == [
            *("ours up", "peer up", *samples, *warm_up, *counted, "ours down", "peer down")
        ]

    def test_the_warm_up_does_not_count(self) -> None:
        result, _ = measured([99, 99, 2, 4, 3], [99, 99, 1, 1, 1], repeats=3)
        comparison = result.cases[0].comparison(result.scenario.figures[0])
        assert comparison is not None
        assert (comparison.ours.median, comparison.ratio.median) == (3, 3)
        assert result.errors == 0

    def test_different_answers_make_a_run_invalid(self) -> None:
        with pytest.raises(InvalidRun, match=r"'x'.*'y'"):
            measured([1] * 5, [1] * 5, repeats=3, says="y")

    def test_errors_are_counted_and_end_the_case(self) -> None:
        result, log = measured([1, 1, -1, 1], None, repeats=3)
        assert (result.errors, result.cases[0].errors) == (1, [Counter({"it broke": 1})])
        assert log == ["ours up", *["ours"] * 3, "ours down"]
        assert any("1 × it broke" in each for each in result.warnings())

    def test_a_target_that_cannot_answer_the_samples(self) -> None:
        with pytest.raises(NotStarted, match="peer cannot answer: it broke"):
            measured([1] * 5, [-1] * 5, repeats=3)

    async def test_targets_are_stopped_when_it_is_cut_off(self) -> None:
        class Hanging(Fixed):
            async def call(self, streams: Streams) -> Answers:
                asyncio.get_running_loop().call_soon(task.cancel)
                await asyncio.Event().wait()
                raise AssertionError

        log: list[str] = []
        targets = [Hanging("ours", log, [])]
        task = asyncio.create_task(run(Plain(["any"], Settings()), targets, 1, lambda what: None))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["ours up", "ours down"]

    def test_starting_is_measured_of_servers_only(self) -> None:
        startup = SCENARIOS["startup"](["any"], Settings())
        with pytest.raises(BadSetUp, match="starting"):
            asyncio.run(run(startup, [Fixed("ours", [], [])], 1, lambda what: None))


class TestReport:
    def test_table(self) -> None:
        result, _ = measured([1, 1, 2, 4, 3], [1, 1, 1, 1, 1], repeats=3)
        text = report.markdown(result, MACHINE, "roundhouse bench plain", 3)
        assert "|  | figure | ours | peer | ours ÷ peer |" in text
        assert (
            "| plain | time, s | 3.00 (2.50–3.50) | 1.00 (1.00–1.00) | 3.00 (2.50–3.50) |" in text
        )
        assert "| plain | turns | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |  |" in text
        assert "2026-11-21 10:00 UTC, commit abc1234" in text
        assert "2 cores of A Processor, 24.0 GiB, no GPU" in text
        assert "    roundhouse bench plain\n" in text
        assert "start peer" in text

    def test_noise_is_marked_and_told(self) -> None:
        result, _ = measured([1, 1, 0.5, 1, 1.5], [1] * 5, repeats=3)
        text = report.markdown(result, MACHINE, "", 3)
        assert "1.00 (0.75–1.25) ≈ |" in text
        assert "* plain: the ratio's spread is wider" in text and "shown in time, rate" in text

    def test_document(self, tmp_path: Path) -> None:
        result, _ = measured([1, 1, 2, 4, 3], [1, 1, 1, 1, 1], repeats=3)
        paths = report.write(tmp_path / "new", result, MACHINE, "the command", 3)
        document = json.loads(paths[0].read_text())
        (case,) = document["cases"]
        assert document["machine"] == MACHINE and document["command"] == "the command"
        assert [each["name"] for each in document["sides"]] == ["ours", "peer"]
        # In the order in which they were measured: the second pair began with the peer.
        assert [turn["time"] for turn in case["sides"][0]["turns"]] == [2, 4, 3]
        assert case["ratios"]["time"] == {"median": 3, "q1": 2.5, "q3": 3.5, "noisy": False}

    def test_a_target_without_figures(self, tmp_path: Path) -> None:
        result, _ = measured([-1], None, repeats=1)
        report.write(tmp_path, result, MACHINE, "", 1)
        assert "| plain | time, s | – |" in (tmp_path / "plain.md").read_text()
        plot.draw(result, tmp_path / "plain.png")

    def test_a_figure_that_there_is_not(self, tmp_path: Path) -> None:
        """As the gaps between tokens of answers of one token."""
        result, _ = measured([1, 1, 2, 4, 3], [1, 1, 1, 1, 1], repeats=3)
        for turn in result.cases[0].figures[0]:
            turn["time"] = math.nan
        paths = report.write(tmp_path, result, MACHINE, "", 3)
        assert "| plain | time, s | – | 1.00 (1.00–1.00) | – |" in paths[1].read_text()
        (case,) = json.loads(paths[0].read_text())["cases"]
        assert case["sides"][0]["turns"][0]["time"] is None

    def test_plot(self, tmp_path: Path) -> None:
        result, _ = measured([1, 1, 2, 4, 3], [1, 1, 1, 1, 1], repeats=3)
        plot.draw(result, tmp_path / "plain.png")
        assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")


SMAPS = """\
7f0000000000-7f0000002000 r-xp 00000000 fe:00 77                 /usr/lib/a b.so
Rss:                   8 kB
Pss:                   4 kB
Anonymous:             0 kB
VmFlags: rd ex
7f0000002000-7f0000003000 rw-p 00002000 fe:00 77                 /usr/lib/a b.so
Rss:                   8 kB
Pss:                   8 kB
Anonymous:             4 kB
7f0000010000-7f0000020000 rw-p 00000000 00:00 0                  [heap]
Rss:                  64 kB
Pss:                  64 kB
Anonymous:            64 kB
7f0000030000-7f0000040000 rw-p 00000000 00:00 0
Rss:                  16 kB
Anonymous:            16 kB
"""

FORKED = """
import mmap, os, sys
kept = bytearray(os.urandom(1 << 20)) * 64
file = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)
(read, write), (wait, tell) = os.pipe(), os.pipe()
child = os.fork()
touched = mapped[::4096]
if child == 0:
    os.write(tell, b"x")
    os.read(read, 1)
    os._exit(0)
os.read(wait, 1)
print("ready", flush=True)
sys.stdin.read()
os.write(write, b"x")
os.wait()
"""


class TestMemory:
    def test_pages_of_files(self) -> None:
        assert read_file_pages(SMAPS) == {"77 /usr/lib/a b.so": 12 * 1024}

    def test_rollup(self) -> None:
        text = "1-2 ---p 00 00:00 0 [rollup]\nRss:  10 kB\nPss_Anon:  3 kB\n"
        assert read_rollup(text) == {"Rss": 10 * 1024, "Pss_Anon": 3 * 1024}

    def test_what_processes_share_counts_once(self, tmp_path: Path) -> None:
        """A parent of 64 MiB and its fork, both of which read a file of 64 MiB."""
        file = tmp_path / "file"
        file.write_bytes(bytes(64 * 2**20))
        command = [sys.executable, "-c", FORKED, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            memory = memory_of(process.pid)
            process.communicate()
        assert memory.processes == 2
        assert 128 * 2**20 < memory.total_bytes < 170 * 2**20
        assert memory.rss_bytes > 256 * 2**20

    def test_a_process_that_is_gone_holds_nothing(self) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            process.wait()
        assert memory_of(process.pid).total_bytes == 0


def test_processor_time_of_a_target_is_not_that_of_others() -> None:
    before = ProcessorTime.now()
    # A little more than is looked for: the kernel counts in ticks.
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    after = ProcessorTime.now()
    assert after.own_s - before.own_s >= 0.5
    assert after.machine_s - before.machine_s >= 0.4
    nothing_own = ProcessorTime(after.machine_s, before.own_s)
    assert nothing_own.others_since(before) - after.others_since(before) >= 0.4


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    config, _ = load_settings(None, {})
    models = choose_models(config, ["tiny-llama"], read_overrides(["kv_cache=256MiB"]))
    folder = tmp_path / "llama"
    return SetUp(tmp_path, models, (folder,), {"OMP_NUM_THREADS": "2"}, on_gpu=False, memory="1GiB")


class TestTargets:
    def test_both_servers_get_the_same(
        self, set_up: SetUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        command = tmp_path / "vllm"
        command.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        set_up.write()
        config, _ = load_settings(set_up.config_path, {})
        (model,) = config.models
        options = model.options_as(VllmOptions)
        assert options.kv_cache == 256 * 2**20
        assert (model.id, options.dtype, options.max_model_len) == (
            "tiny-llama",
            "float32",
            8192,
        )
        peer = vllm_serve(set_up)
        line = " ".join(peer.arguments)
        for part in (
            f"serve {set_up.model_folders[0]}",
            "--served-model-name tiny-llama",
            "--dtype float32",
            "--max-model-len 8192",
            f"--kv-cache-memory-bytes {256 * 2**20}",
            "--max-num-seqs 256",
            "--enforce-eager",
        ):
            assert part in line
        assert str(set_up.config_path) in ours(set_up).arguments
        for each in (ours(set_up), peer):
            assert each.environment["OMP_NUM_THREADS"] == "2"
        # Else it would take a number of its own.
        assert peer.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        alone = vllm_serve(replace(set_up, environment={}))
        assert "VLLM_CPU_OMP_THREADS_BIND" not in alone.environment

    @pytest.mark.parametrize("pair", ["kv_cache", "=1", "colour=red"])
    def test_options_that_are_none(self, pair: str) -> None:
        config, _ = load_settings(None, {})
        with pytest.raises(BadSetUp, match="--set"):
            choose_models(config, ["tiny-llama"], read_overrides([pair]))

    async def test_a_target_that_dies_says_why(self, tmp_path: Path) -> None:
        command = Command("dead", (sys.executable, "-c", "raise SystemExit('no steam')"), {})
        target = Server(command, tmp_path, 10.0)
        with pytest.raises(NotStarted, match="dead ended with status 1: no steam"):
            await target.start()
        await target.stop()

    async def test_stopping_ends_grandchildren_too(self, tmp_path: Path) -> None:
        """As `vllm serve` leaves its engine when it is killed."""
        code = (
            "import signal, subprocess, sys\n"
            "wait = 'import signal; signal.alarm(60); signal.pause()'\n"
            "child = subprocess.Popen([sys.executable, '-c', wait])\n"
            "open(sys.argv[1], 'w').write(str(child.pid))\n"
            "signal.pause()\n"
        )
        told = tmp_path / "pid"
        os.mkfifo(told)  # so that reading waits for what is written
        target = Server(
            Command("family", (sys.executable, "-c", code, str(told)), {}), tmp_path, 10.0
        )
        target.spawn()
        child = int(await asyncio.to_thread(told.read_text))
        assert target.pid is not None and memory_of(target.pid).processes == 2
        await target.stop()
        assert memory_of(child).total_bytes == 0


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["bench", *arguments])


@pytest.mark.slow
class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["speech", "--against", "vllm-serve"], "can be measured against bare"),
            (["swap", "--against", "bare"], "against nothing"),
            (["llm", "--url", "http://127.0.0.1:9", "--against", "bare"], "leave --url out"),
            (["llm", "--model", "a", "--model", "b"], "asks 1 models"),
            (["llm", "--model", "nothing"], "'nothing' does not exist"),
            (["llm", "--set", "colour=red"], "colour"),
            (["startup", "--url", "http://127.0.0.1:9"], "starting a server"),
        ],
    )
    def test_what_cannot_be_run(self, arguments: list[str], said: str) -> None:
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert said in result.stderr
        assert "Traceback" not in result.output

    async def test_sigterm_ends_it_in_order(self) -> None:
        """Or the servers that it started would stay behind."""
        asked = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.set()
            await reader.read()  # until the client gives up
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server.commands.cli", "bench", "llm", "--url", url),
                stderr=subprocess.PIPE,
                cwd=ROOT,
            )
            await asyncio.wait_for(asked.wait(), 60)
            process.terminate()
            _, said = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 128 + signal.SIGTERM
        assert b"Traceback" not in said

    def test_answers_of_a_good_server(self, wrong_server: str, tmp_path: Path) -> None:
        result = invoke(
            *("llm", "--url", wrong_server, "--model", "good", "--streams", "2"),
            *("--repeats", "2", "--out", str(tmp_path)),
        )
        assert result.exit_code == 0, result.output
        assert {path.name for path in tmp_path.iterdir()} == {"llm.json", "llm.md", "llm.png"}

    @pytest.mark.parametrize(("model", "said"), [("status", "status 500"), ("breaks", "broke off")])
    def test_a_server_that_is_wrong(self, wrong_server: str, model: str, said: str) -> None:
        result = invoke(
            *("llm", "--url", wrong_server, "--model", model, "--streams", "2", "--rounds", "1")
        )
        assert result.exit_code == 1
        assert "2 ×" in result.stderr and said in result.stderr

    def test_a_server_that_is_wrong_sometimes(self, wrong_server: str) -> None:
        """Figures are of the good answers, and the bad ones are counted all the same."""
        result = invoke(
            *("llm", "--url", wrong_server, "--model", "sometimes-status", "--streams", "1"),
            *("--rounds", "4", "--repeats", "3"),
        )
        assert result.exit_code == 1
        assert "8 × status 500" in result.stderr
        assert "tokens/s" in result.stdout and "–" in result.stdout


@pytest.mark.slow
def test_a_real_server(server: RealServer, tmp_path: Path) -> None:
    result = invoke(
        *("llm", "--url", server.url, "--streams", "1", "--streams", "4"),
        *("--repeats", "1", "--output-tokens", "16", "--rounds", "2", "--out", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output
    one, four = json.loads((tmp_path / "llm.json").read_text())["cases"]
    for case in (one, four):
        (target,) = case["sides"]
        (figures,) = target["turns"]
        assert target["errors"] == {}
        assert figures["tokens"] > 0
        assert 0 < figures["TTFT p50"] <= figures["TTFT p99"]
        assert 0 < figures["ITL p50"] <= figures["ITL p99"]
