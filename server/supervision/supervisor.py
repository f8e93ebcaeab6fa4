"""The parent of the process that serves: starts it, listens to its heart, starts it again.

Only the standard library and `server.supervision.fallback_responder`: what is not imported
cannot break, and takes no memory (13 MB, where the command line alone has 68). For that,
`roundhouse serve` becomes this program once it listens (`become`), and this one runs the same
command once more with the listener handed down. The socket stays open while nobody serves:
clients that connect in the seconds of a restart wait in its queue, and are answered by the next
process.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from server.supervision.fallback_responder import FallbackResponder

logger = logging.getLogger("server.supervision.supervisor")  # also as a program

CANNOT_START = 1
BAD_CONFIG = 2
INTERRUPTED = 130

TICK_S = 0.5
"""How long to wait for something to happen before looking at the time."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
STEADY_S = 60.0
"""Who was ready for so long has recovered: the next restart is at once, as the first one."""
STACKS_S = 0.5
"""What a hung process gets to write down where it hangs, before it is killed."""
STOP_S = 30.0
"""What a process gets beyond its drain to unload its models, before it is killed."""
MAX_MESSAGE_BYTES = 2**17
"""Of one message on the line: some hundreds of model ids of the greatest length."""


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """What the supervisor is told, as one JSON argument."""

    command: tuple[str, ...]
    """What to run; two descriptors are added to it: `--supervised LISTENER,LINE`."""
    listener: int
    """The descriptor of the listening socket."""
    hang_s: float
    """Of silence, once it was ready."""
    stall_s: float
    """Of silence, before."""
    drain_s: float
    log_level: str = "INFO"


def become(config: SupervisorConfig, listener: socket.socket) -> NoReturn:
    """Turn this process into the supervisor. Returns only by an exception.

    Raises:
        OSError: the interpreter cannot be run.

    """
    listener.set_inheritable(True)
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [sys.executable, "-m", "server.supervision.supervisor", json.dumps(asdict(config))]
    os.execv(sys.executable, arguments)


class Child:
    """One process that serves, and what it told."""

    def __init__(self, config: SupervisorConfig, hello: dict[str, Any]) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.

        """
        # Datagrams in order, and an end: a message is never torn.
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.setblocking(False)
        self.line.send(json.dumps(hello).encode())
        try:
            self.process = subprocess.Popen(
                [*config.command, "--supervised", f"{config.listener},{theirs.fileno()}"],
                stdin=subprocess.DEVNULL,
                pass_fds=(config.listener, theirs.fileno()),
                # Or a Ctrl-C would reach it twice, and the second one ends it at once.
                process_group=0,
            )
        finally:
            theirs.close()
        self.beaten = False
        self.ready = False
        self.silent_s = 0.0
        """Since its last beat, or its start."""
        self.steady_s = 0.0
        """Since it was ready."""
        self.residents: list[str] = []
        self.fault: str | None = None
        """Why it will end, by its own word or by ours."""
        self.dying_s: float | None = None
        """Since it was told to write down its stacks."""
        self.killed = False

    def read(self) -> bool:
        """Take the messages that are there; False if no more will come."""
        while True:
            try:
                data = self.line.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            message = json.loads(data)
            if "fault" in message:
                self.fault = message["fault"]
                continue
            self.beaten = True
            self.ready = self.ready or message["ready"]
            self.residents = message["residents"]
            self.silent_s = 0.0

    def replace(self, why: str) -> None:
        """Begin to end it: its stacks first."""
        if self.dying_s is None:
            self.fault = self.fault or why
            self.dying_s = 0.0
            self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it."""
        self.killed = True
        self.process.kill()

    def on_time(self, elapsed_s: float) -> None:
        """Count time."""
        self.silent_s += elapsed_s
        if self.ready:
            self.steady_s += elapsed_s
        if self.dying_s is not None:
            self.dying_s += elapsed_s
            if self.dying_s >= STACKS_S and not self.killed:
                self.kill()


class Supervisor:
    """Keeps one child serving until it is told to stop, or there is no use in it."""

    def __init__(
        self,
        config: SupervisorConfig,
        listener: socket.socket,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`listener` is what `config` names."""
        self._config = config
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._fallback = FallbackResponder(self._selector, listener)
        self._child: Child | None = None
        self._ever_ready = False
        self._failures = 0
        """Restarts in a row without a steady time between."""
        self._waits_s = 0.0
        """Until the next start, while there is no child."""
        self._restarts: dict[str, Any] = {"count": 0, "reason": None, "at": None}
        self._residents: list[str] = []
        self._signals: list[int] = []
        self._stopping_s: float | None = None
        self._interrupted = False

    def run(self) -> int:
        """Supervise, and return the exit status."""
        with self._wakened_by_signals():
            try:
                self._start()
                then = self._clock()
                while True:
                    for key, _ in self._selector.select(TICK_S):
                        key.data()
                    now = self._clock()
                    # Had this process stood still, so would the child have: it gets no blame.
                    status = self._turn(min(now - then, 2 * TICK_S))
                    then = now
                    if status is not None:
                        return status
            finally:
                self._fallback.close()
                if self._child is not None:
                    self._child.kill()

    def _turn(self, elapsed_s: float) -> int | None:
        self._fallback.on_time(elapsed_s)
        while self._signals:
            self._on_signal(self._signals.pop(0))
        child = self._child
        if child is None:
            if self._stopping_s is not None:
                return INTERRUPTED if self._interrupted else 0
            self._waits_s -= elapsed_s
            if self._waits_s <= 0:
                self._start()
            return None
        code = child.process.poll()
        if code is not None:
            return self._on_exit(child, code)
        child.on_time(elapsed_s)
        limit_s = self._config.hang_s if child.ready else self._config.stall_s
        if self._stopping_s is not None:
            # The interpreter's own end is silent, and giving much memory back takes long.
            self._stopping_s += elapsed_s
            if self._stopping_s > self._config.drain_s + STOP_S:
                self._replace(child, "it does not end")
        elif child.silent_s > limit_s:
            self._replace(child, f"it has given no sign of life for {child.silent_s:.0f} s")
        # Nobody waits longer in the queue than it takes to find a hang.
        if child.silent_s > self._config.hang_s:
            self._refuse(self._config.hang_s)
        else:
            self._fallback.turn_off()
        return None

    def _replace(self, child: Child, why: str) -> None:
        if child.dying_s is None:
            logger.error("the process %d is ended: %s", child.process.pid, why)
            child.replace(why)

    def _refuse(self, retry_after_s: float) -> None:
        self._fallback.retry_after_s = max(1, round(retry_after_s))
        self._fallback.turn_on()

    def _start(self) -> None:
        hello = {"pid": os.getpid(), "restarts": self._restarts, "residents": self._residents}
        child = Child(self._config, hello)
        self._selector.register(child.line, selectors.EVENT_READ, lambda: self._hear(child))
        self._child = child
        self._fallback.turn_off()

    def _hear(self, child: Child) -> None:
        # Once it has ended the line stays readable, and would wake the selector for ever.
        if not child.read() and child.line in self._selector.get_map():
            self._selector.unregister(child.line)

    def _on_exit(self, child: Child, code: int) -> int | None:
        child.read()  # its last word
        self._ever_ready = self._ever_ready or child.ready
        if child.line in self._selector.get_map():
            self._selector.unregister(child.line)
        child.line.close()
        self._child = None
        reason = child.fault or _words(code)
        if self._stopping_s is not None:
            return self._stopped(child, code)
        if code == BAD_CONFIG or (code == CANNOT_START and not self._ever_ready):
            return code  # it said why, and would say so again
        if child.steady_s >= STEADY_S:
            self._failures = 0
        self._failures += 1
        # What was loaded may be what ends it each time.
        self._residents = child.residents if self._failures == 1 else []
        self._waits_s = pause_s(self._failures)
        self._restarts = {
            "count": self._restarts["count"] + 1, "reason": reason, "at": time.time()
        }  # fmt: skip
        logger.error(
            "the process %d has ended: %s; it is started again %s",
            child.process.pid,
            reason,
            f"in {self._waits_s:.0f} s" if self._waits_s else "now",
        )
        if self._waits_s:
            self._refuse(self._waits_s)
        else:
            self._start()
        return None

    def _stopped(self, child: Child, code: int) -> int:
        if self._interrupted:
            return INTERRUPTED
        if child.fault is not None:
            return 1
        if code < 0:  # before it took signals itself there was nothing to drain
            return 1 if child.beaten else 0
        return code

    def _on_signal(self, number: int) -> None:
        again = self._stopping_s is not None
        self._stopping_s = self._stopping_s or 0.0
        if again and number == signal.SIGINT:
            self._interrupted = True
        if self._child is None:
            return
        if self._interrupted or not self._child.beaten:
            self._child.kill()
        else:
            logger.info("%s: the server drains", signal.Signals(number).name)
            self._child.process.send_signal(number)

    @contextmanager
    def _wakened_by_signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT, and wake the selector for them and for the end of the child."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, lambda: ours.recv(4096))
        handlers: dict[int, Any] = {
            signal.SIGTERM: lambda number, _: self._signals.append(number),
            signal.SIGINT: lambda number, _: self._signals.append(number),
            signal.SIGCHLD: lambda *_: None,
        }
        before = {number: signal.signal(number, each) for number, each in handlers.items()}
        woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()
            self._selector.close()


def pause_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row, 1 or more: none at first, then doubling."""
    if failures == 1:
        return 0.0
    return min(LAST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 2, 16))


def _words(code: int) -> str:
    """An exit status, for people."""
    if code >= 0:
        return f"it ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"it was ended by signal {name}"


def main(arguments: list[str]) -> int:
    """Supervise as the config say that are the only argument."""
    raw = json.loads(arguments[0])
    config = SupervisorConfig(**{**raw, "command": tuple(raw["command"])})
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listener = socket.socket(fileno=config.listener)
    listener.set_inheritable(False)
    return Supervisor(config, listener).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
