"""The sides of a measurement: a server at an address, one that is started here, a bare library."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from engine.config import ENV_PREFIX
from server.bench.errors import NotStarted
from server.bench.http_caller import HttpCaller, as_it_is
from server.bench.memory import tree
from server.bench.work import Answer, Answers, Caller, Streams, Work

START_S = 300.0
STOP_S = 60.0
POLL_S = 0.05
LAST_WORDS = 1500
"""Characters of a dead side's log that its error tells."""


class Side(ABC):
    """One of the things compared."""

    name: str
    command: tuple[str, ...] = ()
    """How it was started; empty: it was there."""
    environment: Mapping[str, str]
    """What was set for it beside the environment of this process."""
    caller: Caller
    pid: int | None = None

    @abstractmethod
    async def start(self) -> None:
        """Start it and return when it can be asked.

        Raises:
            NotStarted: it did not come up.

        """

    @abstractmethod
    async def stop(self) -> None:
        """End it and all its processes; whoever was there before stays."""

    def check(self) -> None:  # noqa: B027 - one that was there is not ours to watch
        """Return if it still runs.

        Raises:
            NotStarted: it died.

        """


class Address(Side):
    """A server that somebody else started."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.name = url
        self.environment = {}
        self.caller = HttpCaller(url, api_key, timeout_s=timeout_s)

    async def start(self) -> None:
        """Nothing to do: what is wrong with it shows in its answers."""

    async def stop(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a process to measure."""

    name: str
    command: tuple[str, ...]
    """`{port}` in it becomes a free port."""
    environment: Mapping[str, str]
    ready_path: str = "/health"
    """Answers with 200 when the server can be asked."""
    adapt: Callable[[Work], Work] = as_it_is
    """Says a request in the server's own words."""


class Started(Side):
    """A process that is started here and ended afterwards, with all that it started."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        """Its output goes to a file in `folder`."""
        self.name = launch.name
        self.environment = launch.environment
        self.port = _free_port()
        self.command = tuple(part.format(port=self.port) for part in launch.command)
        self.log_path = folder / f"{launch.name}.log"
        self._launch = launch
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
                # Its own group: Ctrl-C reaches this process, which then ends it in order.
                start_new_session=True,
            )
        self.pid = self._process.pid
        return self._process

    def check(self) -> None:
        """As `Side.check`."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise NotStarted(f"{self.name} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return text[-LAST_WORDS:].strip()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left after a minute."""
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
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        self.pid = None


class Server(Started):
    """An OpenAI-compatible server."""

    def __init__(self, launch: Launch, folder: Path, timeout_s: float) -> None:
        """`timeout_s` is for each request."""
        super().__init__(launch, folder)
        self.url = f"http://127.0.0.1:{self.port}"
        self.caller = HttpCaller(self.url, timeout_s=timeout_s, adapt=launch.adapt)

    async def start(self) -> None:
        """As `Side.start`, asking as a load balancer does."""
        self.spawn()
        deadline = time.monotonic() + START_S
        async with httpx.AsyncClient(timeout=START_S) as client:
            while True:
                self.check()
                if time.monotonic() > deadline:
                    await self.stop()
                    raise NotStarted(f"{self.name} is not ready: {self.last_words()}")
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(self.url + self._launch.ready_path)
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(POLL_S)

    async def first_answer(self, work: Work) -> float:
        """Start it, send a request until it is answered, and return the seconds to its first token.

        Counted from before the process is made, on this process's clock.

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
                raise NotStarted(f"{self.name}: {answer.error}: {self.last_words()}")
            await asyncio.sleep(POLL_S)


class BareLibrary(Started):
    """A process that calls the library itself and is told what to do by lines of JSON."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        super().__init__(launch, folder)
        self.caller = self

    async def start(self) -> None:
        """As `Side.start`."""
        self.spawn(pipes=True)
        await asyncio.to_thread(self._line)

    async def call(self, streams: Streams) -> Answers:
        """As `Caller.call`."""
        asked = [[work.document() for work in series] for series in streams]
        answers = await asyncio.to_thread(self._ask, json.dumps(asked))
        return Answers([Answer.read(each) for each in json.loads(answers)], client_cpu_s=0.0)

    def _ask(self, line: str) -> str:
        assert self._process is not None and self._process.stdin is not None  # started
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotStarted(f"{self.name} ended: {self.last_words()}") from None
        return self._line()

    def _line(self) -> str:
        assert self._process is not None and self._process.stdout is not None  # started
        line = self._process.stdout.readline()
        if not line:
            raise NotStarted(f"{self.name} ended: {self.last_words()}")
        return line.decode()


def _environment() -> dict[str, str]:
    """This process's, less what would configure a server: keys that nobody would send, say."""
    return {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
