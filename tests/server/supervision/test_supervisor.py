"""The supervisor over a trivial process; what that process does is in `trivial_child.py`."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.supervision.fallback_responder import answer
from server.supervision.supervisor import (
    FIRST_PAUSE_S,
    LAST_PAUSE_S,
    STEADY_S,
    Supervisor,
    SupervisorConfig,
    pause_s,
)

pytestmark = pytest.mark.slow  # twelve seconds: they start processes and wait for them

TIMEOUT_S = 30.0


class Clock:
    """Each look at it takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.alarms: list[tuple[float, Callable[[], None]]] = []
        """What is called at a time, with the seconds to it."""
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += self.step_s
        for at_s, ring in self.alarms:
            if self._now_s >= at_s:
                ring()
        return self._now_s


class Stand:
    """A listener and a script."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.clock = Clock(0.01)

    def config(self, *words: str, hang_s: float = 60.0, drain_s: float = 60.0) -> SupervisorConfig:
        module = "tests.server.supervision.trivial_child"
        command = (sys.executable, "-m", module, str(self.record), *words)
        return SupervisorConfig(command, self.listener.fileno(), hang_s, 600.0, drain_s)

    def run(self, *words: str, **limits: float) -> int:
        """Supervise a process that does what the words say, and return the exit status."""
        return Supervisor(self.config(*words, **limits), self.listener, self.clock).run()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Whatever happens inside, the time goes on after it."""
        try:
            yield
        finally:
            self.clock.step_s = 1.0

    def starts(self) -> list[dict[str, Any]]:
        """What each process was told at its start."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path)
    yield stand
    stand.listener.close()


def reasons(stand: Stand) -> list[str | None]:
    return [start["reason"] for start in stand.starts()]


class TestRestart:
    @pytest.mark.parametrize(
        ("end", "reason"),
        [
            ("signal:9", "it was ended by signal SIGKILL"),
            ("exit:1", "it ended with status 1"),
            ("exit:0", "it ended with status 0"),
            ("fault:the device is lost", "the device is lost"),
        ],
    )
    def test_whatever_ends_it(self, stand: Stand, end: str, reason: str) -> None:
        assert stand.run(f"beats:1,{end}", "exit:2") == 2
        first, second = stand.starts()
        assert (first["count"], first["reason"], first["at"]) == (0, None, None)
        assert (second["count"], second["reason"]) == (1, reason)
        assert abs(second["at"] - time.time()) < TIMEOUT_S
        assert first["pid"] != second["pid"]

    def test_what_was_loaded_is_handed_on_once(self, stand: Stand) -> None:
        """What dies of a model would else die of it again and again."""
        stand.clock.step_s = 1.0
        assert stand.run("beats:1,exit:1", "beats:1,exit:1", "exit:2") == 2
        assert [start["residents"] for start in stand.starts()] == [[], ["most", "less"], []]

    def test_a_steady_time_makes_it_the_first_again(self, stand: Stand) -> None:
        stand.clock.step_s = 1.0
        # Far more than its own start and the one before take.
        stand.clock.alarms = [(4 * STEADY_S, stand.record.with_suffix(".steady").touch)]
        assert stand.run("beats:1,exit:1", "beats-until-steady,exit:1", "exit:2") == 2
        assert stand.starts()[-1]["residents"] == ["most", "less"]

    def test_pauses_double_up_to_a_bound(self) -> None:
        pauses = [pause_s(failures) for failures in range(1, 10)]
        assert pauses[:4] == [0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
        assert pauses[-1] == pause_s(10_000) == LAST_PAUSE_S

    @pytest.mark.parametrize("words", [["exit:2"], ["exit:1"], ["starts,exit:1"]])
    def test_one_that_says_why_it_cannot_start_is_left(
        self, stand: Stand, words: list[str]
    ) -> None:
        assert stand.run(*words) == int(words[0][-1])
        assert len(stand.starts()) == 1

    def test_its_last_word_is_heard_with_its_end(self, stand: Stand) -> None:
        gate = stand.record.with_suffix(".gate")
        os.mkfifo(gate)
        looks = 0

        def clock() -> float:
            """Between the look at the line and the one at the process it says that, and ends."""
            nonlocal looks
            looks += 1
            if looks == 2:
                gate.write_text("go on")
                process = psutil.Process(stand.starts()[0]["pid"])
                while process.status() != psutil.STATUS_ZOMBIE:
                    pass
            return 0.0

        config = stand.config("wait,fault:the device is lost", "exit:2")
        assert Supervisor(config, stand.listener, clock).run() == 2
        assert reasons(stand) == [None, "the device is lost"]

    @pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
    def test_a_machine_without_room_for_a_process_is_asked_again(
        self, stand: Stand, monkeypatch: pytest.MonkeyPatch, error: int
    ) -> None:
        calls, popen = 0, subprocess.Popen

        def limited(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
            nonlocal calls
            calls += 1
            if calls in (2, 3):
                raise OSError(error, os.strerror(error))
            return popen(*args, **options)

        monkeypatch.setattr(subprocess, "Popen", limited)
        stand.clock.step_s = 1.0
        assert stand.run("beats:1,exit:1", "exit:2") == 2
        assert calls == 4
        assert reasons(stand) == [None, "it ended with status 1"]

    def test_one_that_cannot_be_started_at_all_is_reported(
        self, stand: Stand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(*_: Any, **__: Any) -> None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

        monkeypatch.setattr(subprocess, "Popen", missing)
        with pytest.raises(FileNotFoundError):
            stand.run("exit:2")

    def test_the_longest_messages_are_shortened_and_not_cut(self, stand: Stand) -> None:
        assert stand.run("beats-of-many:5000,long-fault:1000000", "exit:2") == 2
        _, second = stand.starts()
        assert second["residents"] == [f"{number:0120}" for number in range(528)]
        assert set(second["reason"]) == {"x"}

    def test_a_damaged_message_does_not_end_the_supervisor(self, stand: Stand) -> None:
        assert stand.run("beats:1,garbage,exit:1", "exit:2") == 2
        assert len(stand.starts()) == 2

    def test_one_that_crashes_while_it_starts_is_not(self, stand: Stand) -> None:
        assert stand.run("signal:11", "exit:2") == 2
        assert reasons(stand) == [None, "it was ended by signal SIGSEGV"]


class TestHang:
    def test_silence(self, stand: Stand, capfd: pytest.CaptureFixture[str]) -> None:
        stand.clock = Clock(0.5)
        assert stand.run("beats:1,hang", "exit:2", hang_s=1.0) == 2
        assert str(reasons(stand)[1]).startswith("it has given no sign of life for")
        assert "trivial_child.py" in capfd.readouterr().err, "nothing tells where it hung"

    def test_a_stopped_process(self, stand: Stand) -> None:
        stand.clock = Clock(0.5)
        assert stand.run(f"beats:1,signal:{int(signal.SIGSTOP)}", "exit:2", hang_s=1.0) == 2
        assert len(stand.starts()) == 2

    def test_a_start_may_take_long(self, stand: Stand) -> None:
        """Those who ask meanwhile are told to come again; the process is left alone."""
        gate = stand.record.with_suffix(".gate")
        os.mkfifo(gate)
        answers: list[int] = []

        def ask() -> None:
            answers.append(httpx.get(stand.url, timeout=TIMEOUT_S).status_code)
            gate.write_text("go on")

        stand.clock.step_s = 1.0
        client = threading.Thread(target=ask)
        client.start()
        assert stand.run("starts,wait,exit:2", hang_s=1.0) == 2
        client.join()
        assert answers == [503]
        assert len(stand.starts()) == 1


class TestStop:
    def test_it_drains(self, stand: Stand) -> None:
        assert stand.run(f"block,beats:1,tell:{int(signal.SIGTERM)},drain") == 0
        assert len(stand.starts()) == 1

    def test_its_exit_status_is_passed_on(self, stand: Stand) -> None:
        assert stand.run(f"block,beats:1,tell:{int(signal.SIGTERM)},exit:7") == 7

    def test_before_it_serves(self, stand: Stand) -> None:
        assert stand.run(f"tell:{int(signal.SIGTERM)},hang") == 0

    def test_a_second_interrupt_ends_it_at_once(self, stand: Stand) -> None:
        tell = f"tell:{int(signal.SIGINT)}"
        assert stand.run(f"block,beats:1,{tell},beats:1000,{tell},hang") == 130

    def test_one_that_does_not_end(self, stand: Stand) -> None:
        stand.clock.step_s = 1.0
        beating = f"block,beats:1,tell:{int(signal.SIGTERM)},beats:1000000"
        assert stand.run(beating, drain_s=1.0) == 1


def test_it_does_not_outlive_the_supervisor(stand: Stand) -> None:
    config = stand.config("beats:1,tell:9,hang")
    arguments = [sys.executable, "-m", "server.supervision.supervisor", json.dumps(asdict(config))]
    reader, writer = os.pipe()  # whoever lives holds the writing end
    supervisor = subprocess.Popen(arguments, pass_fds=(config.listener,), stdout=writer)
    os.close(writer)
    try:
        assert supervisor.wait(TIMEOUT_S) == -signal.SIGKILL
        readable, _, _ = select.select([reader], [], [], TIMEOUT_S)
        assert readable and os.read(reader, 1) == b"", "the process lives on"
        assert len(stand.starts()) == 1
    finally:
        os.close(reader)


class TestMeanwhile:
    """What clients meet between two processes."""

    def test_a_short_restart_is_waited_for(self, stand: Stand) -> None:
        answers: list[int] = []
        client = threading.Thread(
            target=lambda: answers.append(httpx.get(stand.url, timeout=TIMEOUT_S).status_code)
        )
        client.start()
        assert stand.run("beats:1,exit:1", "beats:1,serve,exit:2") == 2
        client.join()
        assert answers == [200]

    def test_a_long_pause_is_told(self, stand: Stand) -> None:
        """Probes and requests get answers, also one whose body is still on its way."""
        answers: dict[str, httpx.Response] = {}

        def ask() -> None:
            body = {"model": "x", "prompt": "y" * 500_000}
            with stand.paused(), httpx.Client(base_url=stand.url, timeout=TIMEOUT_S) as client:
                for path in ("/v1/chat/completions", "/v1/messages"):
                    answers[path] = client.post(path, json=body)
                for path in ("/health", "/ready", "/ping"):
                    answers[path] = client.get(path)

        stand.clock.step_s = 0.0  # the pause does not end before the client has its answers
        client = threading.Thread(target=ask)
        client.start()
        assert stand.run("beats:1,exit:1", "beats:1,exit:1", "exit:2") == 2
        client.join()
        codes = {path: each.status_code for path, each in answers.items()}
        assert codes.pop("/ping") == 204
        assert codes and set(codes.values()) == {503}
        chat = answers["/v1/chat/completions"]
        assert chat.headers["retry-after"] == "1"
        assert chat.json()["error"]["type"] == "server_error"
        assert set(chat.json()["error"]) == {"message", "type", "param", "code"}
        assert answers["/v1/messages"].json()["error"]["type"] == "overloaded_error"
        assert answers["/health"].json() == {"status": "restarting"}

    def test_an_end_is_told_and_no_restart(self, stand: Stand) -> None:
        """A process that frees much memory is silent for long, and nobody serves after it."""
        gate = stand.record.with_suffix(".gate")
        os.mkfifo(gate)
        answers: dict[str, httpx.Response] = {}

        def ask() -> None:
            with httpx.Client(base_url=stand.url, timeout=TIMEOUT_S) as client:
                for path in ("/v1/models", "/v1/messages", "/health", "/ready", "/ping"):
                    answers[path] = client.get(path)
            gate.write_text("go on")

        stand.clock.step_s = 1.0
        client = threading.Thread(target=ask)
        client.start()
        assert stand.run(f"block,beats:1,tell:{int(signal.SIGTERM)},wait,exit:0") == 0
        client.join()
        assert {each.status_code for each in answers.values()} == {503}
        error = answers["/v1/models"].json()["error"]
        assert (error["code"], error["message"]) == (
            "shutting_down",
            "The server is shutting down.",
        )
        assert "shutting down" in answers["/v1/messages"].json()["error"]["message"]
        for path in ("/health", "/ready", "/ping"):
            assert answers[path].json() == {"status": "draining"}


def test_a_body_on_its_way_does_not_cost_the_answer(stand: Stand) -> None:
    """Closing with bytes unread resets the connection, and some systems then drop the answer."""
    answers: list[bytes] = []

    def ask() -> None:
        with stand.paused(), socket.create_connection(stand.listener.getsockname()) as client:
            client.sendall(b"POST / HTTP/1.1\r\ncontent-length: 4000000\r\n\r\n" + bytes(4_000_000))
            while data := client.recv(4096):
                answers.append(data)

    stand.clock.step_s = 0.0
    client = threading.Thread(target=ask)
    client.start()
    assert stand.run("beats:1,exit:1", "beats:1,exit:1", "exit:2") == 2
    client.join()
    assert b"".join(answers).startswith(b"HTTP/1.1 503 ")


def test_no_body_where_none_was_asked_for() -> None:
    assert answer(b"HEAD /health HTTP/1.1\r\n\r\n", 3).endswith(b"connection: close\r\n\r\n")


@pytest.mark.parametrize("head", [b"", b"nonsense\r\n\r\n", b"GET", b"\xff \xfe\r\n\r\n"])
def test_anything_is_answered(head: bytes) -> None:
    assert answer(head, 3).startswith(b"HTTP/1.1 503 ")


BECOME = """
import socket, sys, threading
from server.supervision.heartbeat import Heartbeat
from server.supervision.supervisor import SupervisorConfig, become

listener = socket.create_server(("127.0.0.1", 0))
if sys.argv[1] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
started = "import sys; print('by the command', sys.argv[1:-1]); sys.exit(2)"
command = (sys.executable, "-c", started)
config = SupervisorConfig(command, listener.fileno(), 60, 60, 60)
heartbeat = Heartbeat.adopt(become(config, listener))
print("goes on", heartbeat.restarts.count, heartbeat.residents, repr(sys.stdin.read()))
sys.exit(2)
"""


@pytest.mark.parametrize(
    ("mode", "output"),
    [("alone", "goes on 0 () ''"), ("threads", "by the command ['--supervised']")],
)
def test_the_process_goes_on_as_the_first_child(mode: str, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BECOME, mode],
        input="for the terminal",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == (output, 2), done.stderr


def test_it_imports_next_to_nothing() -> None:
    code = "import sys, server.supervision.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots & {"engine", "asyncio", "uvicorn", "typer", "pydantic", "torch"} == set()
