"""A process under the supervisor that does, at its nth start, what the nth word of a script says.

    python -m tests.server.supervision.trivial_child RECORD WORD... --supervised LISTENER,CHANNEL

It appends a line of JSON to the file RECORD at each start. The last word is that of all later
starts as well. A word is one or more acts with commas between.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import termios
from dataclasses import asdict
from pathlib import Path

from server.supervision.heartbeat import Heartbeat


def main(record: Path, words: list[str], supervised: str) -> None:
    listener_descriptor, channel_descriptor = map(int, supervised.split(","))
    heartbeat = Heartbeat.adopt(channel_descriptor)
    told = {"pid": os.getpid(), "residents": heartbeat.residents, **asdict(heartbeat.restarts)}
    with record.open("a") as file:
        file.write(json.dumps(told) + "\n")
    for word in words[min(heartbeat.restarts.count, len(words) - 1)].split(","):
        act(word, heartbeat, socket.socket(fileno=os.dup(listener_descriptor)))


def act(word: str, heartbeat: Heartbeat, listener: socket.socket) -> None:
    what, _, value = word.partition(":")
    match what:
        case "beats":
            for _ in range(int(value)):
                beat(heartbeat)
        case "beats-until-steady":
            while not Path(sys.argv[1]).with_suffix(".steady").exists():
                beat(heartbeat)
        case "beats-of-many":
            heartbeat.beat(ready=True, residents=[f"{number:0120}" for number in range(int(value))])
            while unread_bytes(heartbeat):
                pass
        case "garbage":
            heartbeat._channel.send(b'{"fault":')
        case "starts":
            heartbeat.beat(ready=False, residents=[])
        case "exit":
            os._exit(int(value))
        case "signal":
            os.kill(os.getpid(), int(value))
        case "tell":  # the supervisor
            os.kill(os.getppid(), int(value))
        case "fault":
            heartbeat.report(value)
            os._exit(70)
        case "long-fault":
            heartbeat.report("x" * int(value))
            os._exit(70)
        case "wait":
            Path(sys.argv[1]).with_suffix(".gate").read_text()
        case "drain":
            signal.sigwait([signal.SIGTERM])
            os._exit(0)
        case "block":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        case "hang":
            while True:
                signal.pause()
        case "serve":
            listener.setblocking(True)
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            connection.close()


def beat(heartbeat: Heartbeat) -> None:
    """Give a sign of life, and wait until it is taken."""
    heartbeat.beat(ready=True, residents=["most", "less"])
    while unread_bytes(heartbeat):
        pass


def unread_bytes(heartbeat: Heartbeat) -> int:
    """What the supervisor has not taken yet."""
    return int.from_bytes(
        fcntl.ioctl(heartbeat._channel, termios.TIOCOUTQ, bytes(4)), sys.byteorder
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:-2], sys.argv[-1])
