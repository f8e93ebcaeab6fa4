"""The line between the supervisor and the process that serves, as the latter sees it."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

from engine.status import Restarts
from server.supervision.supervisor import MAX_MESSAGE_BYTES

PR_SET_PDEATHSIG = 1
"""prctl(2): which signal this process gets when its parent ends."""


class Heartbeat:
    """A socket on which the supervisor hears that this process is well, or why it is not.

    Each message is one JSON object in one datagram. The supervisor's first and only one tells
    `restarts` (the fields of `Restarts`), `residents` (what was loaded before) and its `pid`.
    """

    def __init__(self, line: socket.socket, residents: Sequence[str], restarts: Restarts) -> None:
        """Use `adopt`."""
        self._line = line
        self.residents = tuple(residents)
        """Models to bring in again, the most asked for first."""
        self.restarts = restarts

    @classmethod
    def adopt(cls, descriptor: int) -> Heartbeat:
        """Take the line over from the supervisor; from now on this process ends with it.

        Its signal USR1 makes this process write the stacks of all threads to standard error, even
        while one of them holds the interpreter.
        """
        line = socket.socket(fileno=descriptor)
        line.set_inheritable(False)
        message = json.loads(line.recv(MAX_MESSAGE_BYTES))
        _end_with(message["pid"])
        line.setblocking(False)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        return cls(line, message["residents"], Restarts(**message["restarts"]))

    def beat(self, *, ready: bool, residents: Sequence[str]) -> None:
        """Tell that this process is well, and what should be loaded again if it ends."""
        self._send({"ready": ready, "residents": residents})

    def report(self, fault: str) -> None:
        """Tell why this process is about to end."""
        self._send({"fault": fault})

    def _send(self, message: object) -> None:
        try:
            self._line.send(json.dumps(message).encode())
        except BlockingIOError:
            pass  # the supervisor stands still; it reads what is queued when it goes on
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended, and so will this process


def _end_with(supervisor: int) -> None:
    """Be killed when the supervisor ends, however it does. Linux only; elsewhere nothing.

    By the kernel, as the end of the line would not be noticed by a process that hangs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it ended before the call
            os._exit(1)
