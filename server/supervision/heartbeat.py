"""The heartbeat that the process that serves sends to its supervisor."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from engine.status import Restarts
from server.supervision.supervisor import MAX_FAULT_CHARACTERS, MAX_MESSAGE_BYTES, fitting

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""


class Heartbeat:
    """Reports on a socket, the channel, that this process is well, or why it is not.

    Each message is one JSON object in one datagram. The supervisor sends one message, the first. It
    has `restarts` (the fields of `Restarts`), `residents` (the models before) and its `pid`.
    """

    def __init__(
        self, channel: socket.socket, residents: Sequence[str], restarts: Restarts
    ) -> None:
        """Use `adopt`."""
        self._channel = channel
        self.residents = tuple(residents)
        """Models to load again, the most requested first."""
        self.restarts = restarts

    @classmethod
    def adopt(cls, descriptor: int) -> Heartbeat:
        """Take the channel from the supervisor. From now on this process ends with it.

        The supervisor's SIGUSR1 makes this process write the stacks of all threads to standard
        error, even while one of them holds the interpreter.
        """
        channel = socket.socket(fileno=descriptor)
        channel.set_inheritable(False)
        message = json.loads(channel.recv(MAX_MESSAGE_BYTES))
        _end_with(message["pid"])
        channel.setblocking(False)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        return cls(channel, message["residents"], Restarts(**message["restarts"]))

    def beat(self, *, ready: bool, residents: Sequence[str]) -> None:
        """Report that this process is well, and the models to load again if it ends."""
        self._send({"ready": ready, "residents": fitting(residents)})

    def report(self, fault: str) -> None:
        """Report why this process is about to end."""
        self._send({"fault": fault[:MAX_FAULT_CHARACTERS]})

    def _send(self, message: object) -> None:
        try:
            self._channel.send(json.dumps(message).encode())
        except BlockingIOError:
            pass  # the supervisor is stopped; it reads the queued messages when it continues
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor has ended, and so will this process
        except OSError as error:  # if that lasts, the supervisor sees the silence
            log.warning("a heartbeat cannot be sent: %s", error)


def _end_with(supervisor: int) -> None:
    """Let the kernel kill this process when the supervisor ends. Does nothing outside of Linux.

    A process that hangs would not notice the end of the channel.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # the supervisor ended before the call
            os._exit(1)
