"""The targets of a measurement: a server at a URL, a server started here, a bare library."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.config import ENV_PREFIX
from server.bench.errors import NotStarted
from server.bench.http_caller import HttpCaller, unchanged
from server.bench.memory import tree
from server.bench.work import Answer, Answers, Caller, Streams, Work

START_S = 300.0
STOP_S = 60.0
POLL_S = 0.05
LOG_CHARS = 1500
"""Characters of a dead target's log that its error shows."""


class Target(ABC):
    """One of the programs to compare."""

    name: str
    command: tuple[str, ...] = ()
    """The command that started it. Empty: it was not started here."""
    environment: Mapping[str, str]
    """Variables that were set on top of this process's environment."""
    caller: Caller
    pid: int | None = None

    @abstractmethod
    async def start(self) -> None:
        """Start it and return when it takes requests.

        Raises:
            NotStarted: it did not start.

        """

    @abstractmethod
    async def stop(self) -> None:
        """End it and all its processes. A target that was not started here keeps running."""

    def check(self) -> None:  # noqa: B027 - one that was not started here is not ours to watch
        """Return if it still runs.

        Raises:
            NotStarted: it died.

        """


class Address(Target):
    """A server that somebody else started."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.name = url
        self.environment = {}
        self.caller = HttpCaller(url, api_key, timeout_s=timeout_s)

    async def start(self) -> None:
        """Nothing to do: its answers show what is wrong."""

    async def stop(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True)
class Command:
    """The command that starts a process to measure."""

    name: str
    arguments: tuple[str, ...]
    """`{port}` in it becomes a free port."""
    environment: Mapping[str, str]
    ready_path: str = "/health"
    """Answers 200 when the server takes requests."""
    adapt: Callable[[Work], Work] = unchanged
    """Translates a request for a server with fields of its own."""


class Started(Target):
    """A process that is started here and ended afterwards, with its descendants."""

    def __init__(self, command: Command, folder: Path) -> None:
        """The output goes to a file in `folder`."""
        self.name = command.name
        self.environment = command.environment
        self.port = _free_port()
        self.command = tuple(part.format(port=self.port) for part in command.arguments)
        self.log_path = folder / f"{command.name}.log"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, *, pipes: bool = False) -> subprocess.Popen[bytes]:
        """Start the process without waiting for anything."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else log,
                stderr=log,
                env={**_environment(), **self.environment},
                # A group of its own: Ctrl-C reaches only this process, which then ends it in order.
                start_new_session=True,
            )
        self.pid = self._process.pid
        return self._process

    def check(self) -> None:
        """As `Target.check`."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise NotStarted(f"{self.name} ended with status {status}: {self.log_end()}")

    def log_end(self) -> str:
        """The end of its log."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return text[-LOG_CHARS:].strip()

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL to what is left after a minute."""
        if self._process is None:
            return
        family = tree(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        _, left = psutil.wait_procs(family, timeout=POLL_S)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        await asyncio.to_thread(_wait_for_end, left)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        self.pid = None


class Server(Started):
    """An OpenAI-compatible server."""

    def __init__(self, command: Command, folder: Path, timeout_s: float) -> None:
        """`timeout_s` applies to each request."""
        super().__init__(command, folder)
        self.url = f"http://127.0.0.1:{self.port}"
        self.caller = HttpCaller(self.url, timeout_s=timeout_s, adapt=command.adapt)

    async def start(self) -> None:
        """As `Target.start`; polls like a load balancer."""
        import httpx

        self.spawn()
        deadline = time.monotonic() + START_S
        async with httpx.AsyncClient(timeout=START_S) as client:
            while True:
                self.check()
                if time.monotonic() > deadline:
                    await self.stop()
                    raise NotStarted(f"{self.name} is not ready: {self.log_end()}")
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(self.url + self._command.ready_path)
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(POLL_S)

    async def first_answer(self, work: Work) -> float:
        """Start it, send a request until it is answered, and return the seconds to its first token.

        This process's clock counts, from before the start of the process.

        Raises:
            NotStarted: it died, or gave no answer in time.

        """
        began_s = time.perf_counter()
        self.spawn()
        while True:
            self.check()
            (answer,) = (await self.caller.call([[work]])).each
            if answer.error is None:
                return answer.sent_s + answer.first_s - began_s
            if time.perf_counter() - began_s > START_S:
                await self.stop()
                raise NotStarted(f"{self.name}: {answer.error}: {self.log_end()}")
            await asyncio.sleep(POLL_S)


class BareLibrary(Started):
    """A process that calls the library directly and reads its requests as lines of JSON."""

    def __init__(self, command: Command, folder: Path) -> None:
        super().__init__(command, folder)
        self.caller = self

    async def start(self) -> None:
        """As `Target.start`."""
        self.spawn(pipes=True)
        await asyncio.to_thread(self._read_line)

    async def call(self, streams: Streams) -> Answers:
        """As `Caller.call`."""
        requests = [[work.document() for work in series] for series in streams]
        answers = await asyncio.to_thread(self._send, json.dumps(requests))
        return Answers([Answer.read(each) for each in json.loads(answers)], client_cpu_s=0.0)

    def _send(self, line: str) -> str:
        assert self._process is not None and self._process.stdin is not None  # started
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotStarted(f"{self.name} ended: {self.log_end()}") from None
        return self._read_line()

    def _read_line(self) -> str:
        assert self._process is not None and self._process.stdout is not None  # started
        line = self._process.stdout.readline()
        if not line:
            raise NotStarted(f"{self.name} ended: {self.log_end()}")
        return line.decode()


def _wait_for_end(processes: Sequence[psutil.Process]) -> None:
    """Wait for killed processes. The kernel may keep one for a while, so not for ever."""
    deadline = time.monotonic() + STOP_S
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has collected yet has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment() -> dict[str, str]:
    """This process's environment without what would configure a server, such as API keys."""
    return {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
