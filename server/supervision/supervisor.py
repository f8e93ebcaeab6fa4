"""The parent of the process that serves: starts it, reads its heartbeat, restarts it.

It imports only the standard library, `server.exit_codes` and the fallback responder. What is not
imported cannot break and takes no memory; `docs/design/supervisor.md` has the figures. So
`roundhouse serve` becomes this program once it listens (`become`), and goes on as its child. To
restart, this program runs the same command again and passes the listener to it. The socket stays
open while no process serves. Clients that connect during a restart wait in its queue, and the next
process answers them.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from server.exit_codes import BAD_CONFIG, FAILED, INTERRUPTED
from server.supervision.fallback_responder import FallbackResponder

logger = logging.getLogger("server.supervision.supervisor")  # also as a program

TICK_S = 0.5
"""The longest wait for an event before the supervisor checks the time."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
STEADY_S = 60.0
"""A process that was ready for so long has recovered. Its next restart is immediate, as the first
one."""
STACKS_S = 1.0
"""Time for a hung process to write its stacks before it is killed: enough on a busy machine too."""
ENDING_S = 3.0
"""Silence of a process that ends, after which clients are refused here. It serves nobody then."""
STOP_S = 30.0
"""Time beyond the drain for a process to unload its models before it is killed."""
MAX_MESSAGE_BYTES = 2**17
"""Size of a message on the channel. A longer one would be cut, and be no JSON any more."""
MAX_RESIDENTS_BYTES = 2**16
"""Of the names of the models to load again: some hundreds of the greatest length."""
MAX_FAULT_CHARACTERS = 2000
_STOPS = (signal.SIGTERM, signal.SIGINT)
NO_RESTARTS: dict[str, Any] = {"count": 0, "reason": None, "at": None}


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """The configuration of the supervisor, passed as one JSON argument."""

    command: tuple[str, ...]
    """The command to run. It gets two descriptors: `--supervised LISTENER,CHANNEL`."""
    listener: int
    """The descriptor of the listening socket."""
    hang_s: float
    """Seconds without a heartbeat that count as a hang, once the process was ready."""
    stall_s: float
    """The same before it was ready."""
    drain_s: float
    log_level: str = "INFO"
    cors_origins: tuple[str, ...] = ()
    """The web pages that may read the answers during a restart."""
    first: tuple[int, int] | None = None
    """A process that serves already, as a child of this one, and our descriptor of its channel."""


def become(config: SupervisorConfig, listener: socket.socket) -> int:
    """Replace this process with the supervisor, and go on in its first child.

    The child has what was imported so far, which saves the half second of another start. Returns
    only in the child: its descriptor of the channel. A process with more threads has no such child,
    as they may hold locks. Its supervisor starts one by the command.

    Raises:
        OSError: no process can be started.

    """
    listener.set_inheritable(True)
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() == 1:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.send(json.dumps(_hello()).encode())
        child = os.fork()
        if not child:
            os.setpgid(0, 0)  # as `Child.start` does
            ours.close()
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            return theirs.detach()
        ours.set_inheritable(True)
        config = replace(config, first=(child, ours.fileno()))
    arguments = [sys.executable, "-m", "server.supervision.supervisor", json.dumps(asdict(config))]
    # The child answers probes already: a signal now waits until the supervisor handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    os.execv(sys.executable, arguments)


def _hello(restarts: dict[str, Any] = NO_RESTARTS, residents: Sequence[str] = ()) -> dict[str, Any]:
    """The message to a child: see `Heartbeat`."""
    return {"pid": os.getpid(), "restarts": restarts, "residents": residents}


class Forked:
    """A child that this process did not start by `subprocess`, with the same methods."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit status once it has ended, negative for a signal."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class Child:
    """One process that serves, and its reports."""

    @classmethod
    def adopt(cls, pid: int, descriptor: int) -> Child:
        """The process that `become` started."""
        channel = socket.socket(fileno=descriptor)
        channel.set_inheritable(False)
        return cls(Forked(pid), channel)

    @classmethod
    def start(cls, config: SupervisorConfig, hello: dict[str, Any]) -> Child:
        """Start one.

        Raises:
            OSError: it cannot be started.

        """
        # Ordered datagrams with an end of file: a message is never split.
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.send(json.dumps(hello).encode())
            process = subprocess.Popen(
                [*config.command, "--supervised", f"{config.listener},{theirs.fileno()}"],
                stdin=subprocess.DEVNULL,
                pass_fds=(config.listener, theirs.fileno()),
                # Otherwise a Ctrl-C would reach it twice, and the second one ends it at once.
                process_group=0,
            )
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        return cls(process, channel)

    def __init__(self, process: subprocess.Popen[bytes] | Forked, channel: socket.socket) -> None:
        """Use `start` or `adopt`."""
        self.process = process
        self.channel = channel
        self.channel.setblocking(False)
        self.beaten = False
        self.ready = False
        self.silent_s = 0.0
        """Since its last heartbeat, or its start."""
        self.steady_s = 0.0
        """Since it was ready."""
        self.residents: list[str] = []
        self.fault: str | None = None
        """Why it will end, by its own report or by our decision."""
        self.dying_s: float | None = None
        """Since it was asked to write its stacks."""
        self.killed = False

    def read(self) -> bool:
        """Read the queued messages; False if no more will come."""
        while True:
            try:
                data = self.channel.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            try:
                message = json.loads(data)
            except ValueError:
                logger.warning("a message of the process %d is damaged", self.process.pid)
                continue
            if "fault" in message:
                self.fault = message["fault"]
                continue
            self.beaten = True
            self.ready = self.ready or message["ready"]
            self.residents = message["residents"]
            self.silent_s = 0.0

    def replace(self, why: str) -> None:
        """Begin to end it. It writes its stacks first."""
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
    """Keeps one child serving until a signal stops it, or a restart has no use."""

    def __init__(
        self,
        config: SupervisorConfig,
        listener: socket.socket,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`listener` is the socket that `config` names."""
        self._config = config
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._fallback = FallbackResponder(self._selector, listener, config.cors_origins)
        self._child: Child | None = None
        self._first = config.first
        self._ever_started = False
        self._ever_ready = False
        self._failures = 0
        """Restarts in a row without a steady time between them."""
        self._waits_s = 0.0
        """Until the next start, if there is no child."""
        self._restarts: dict[str, Any] = NO_RESTARTS
        self._residents: list[str] = []
        self._signals: list[int] = []
        self._stopping_s: float | None = None
        self._interrupted = False

    def run(self) -> int:
        """Supervise, and return the exit status."""
        with self._woken_by_signals():
            try:
                self._start()
                then = self._clock()
                while True:
                    for key, _ in self._selector.select(TICK_S):
                        key.data()
                    now = self._clock()
                    # If this process was suspended, so was the child. That is not a hang.
                    status = self._step(min(now - then, 2 * TICK_S))
                    then = now
                    if status is not None:
                        return status
            finally:
                self._fallback.close()
                if self._child is not None:
                    self._child.kill()

    def _step(self, elapsed_s: float) -> int | None:
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
            # The exit of the interpreter sends no heartbeat, and freeing much memory takes long.
            self._stopping_s += elapsed_s
            if self._stopping_s > self._config.drain_s + STOP_S:
                self._replace(child, "it does not end")
        elif child.silent_s > limit_s:
            self._replace(child, f"it has given no sign of life for {child.silent_s:.0f} s")
        # No client waits longer in the queue than the time to find a hang.
        patience_s = self._config.hang_s
        if self._fallback.stopping:
            patience_s = min(patience_s, ENDING_S)
        if child.silent_s > patience_s:
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
        first, self._first = self._first, None
        try:
            if first is not None:
                child = Child.adopt(*first)
            else:
                child = Child.start(self._config, _hello(self._restarts, self._residents))
        except OSError as error:
            if not self._ever_started:
                raise  # whoever starts the server sees it
            # The machine lacks memory, processes or descriptors, maybe for a moment only.
            self._failures += 1
            self._waits_s = max(FIRST_PAUSE_S, pause_s(self._failures))
            logger.error("no process can be started: %s; next try in %.0f s", error, self._waits_s)
            self._refuse(self._waits_s)
            return
        self._ever_started = True
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._read(child))
        self._child = child
        self._fallback.turn_off()

    def _read(self, child: Child) -> None:
        # Once the child has ended the channel stays readable, and would wake the selector forever.
        if not child.read() and child.channel in self._selector.get_map():
            self._selector.unregister(child.channel)

    def _on_exit(self, child: Child, code: int) -> int | None:
        child.read()  # its last message
        self._ever_ready = self._ever_ready or child.ready
        if child.channel in self._selector.get_map():
            self._selector.unregister(child.channel)
        child.channel.close()
        self._child = None
        reason = child.fault or _reason(code)
        if self._stopping_s is not None:
            return self._stopped(child, code)
        if code == BAD_CONFIG or (code == FAILED and not self._ever_ready):
            return code  # it has reported why, and the next start would end the same way
        if child.steady_s >= STEADY_S:
            self._failures = 0
        self._failures += 1
        # The loaded models may be what ends it each time.
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
        if code < 0:  # a signal before it handled signals: there was nothing to drain
            return 1 if child.beaten else 0
        return code

    def _on_signal(self, number: int) -> None:
        again = self._stopping_s is not None
        self._stopping_s = self._stopping_s or 0.0
        self._fallback.stopping = True
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
    def _woken_by_signals(self) -> Iterator[None]:
        """Store SIGTERM and SIGINT, and wake the selector for them and for the child's end."""
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)  # `become` blocked them
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()
            self._selector.close()


def fitting(residents: Sequence[str]) -> list[str]:
    """The first names of models that fit into a message."""
    names, nbytes = [], 0
    for name in residents:
        nbytes += len(json.dumps(name)) + 2
        if nbytes > MAX_RESIDENTS_BYTES:
            break
        names.append(name)
    return names


def pause_s(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row, at least 1: first none, then doubling."""
    if failures == 1:
        return 0.0
    return min(LAST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 2, 16))


def _reason(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"it ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"it was ended by signal {name}"


def main(arguments: list[str]) -> int:
    """Supervise by the `SupervisorConfig` that is the only argument."""
    raw = json.loads(arguments[0])
    first = raw["first"] and tuple(raw["first"])
    config = SupervisorConfig(**{**raw, "command": tuple(raw["command"]), "first": first})
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listener = socket.socket(fileno=config.listener)
    listener.set_inheritable(False)
    return Supervisor(config, listener).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
