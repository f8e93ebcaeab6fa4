"""Answers 503 with `Retry-After` while no process serves.

Standard library only, as it is part of the supervisor.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Sequence
from dataclasses import dataclass

MAX_HEAD_BYTES = 2**16
MAX_CONNECTIONS = 256
"""With more connections the oldest is closed."""
TIMEOUT_S = 10.0
"""Seconds that a connection has to send its head and to take its answer."""

_READ_BYTES = 2**16


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    head: bytes = b""
    answered: bool = False
    open_s: float = 0.0


class FallbackResponder:
    """Accepts connections of a listener while it is on, and answers each once.

    It shares the listener with the process that serves. Turn it off before that process accepts.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        origins: Sequence[str] = (),
    ) -> None:
        """The owner of `selector` calls the `data` of each event. Begins turned off."""
        self._selector = selector
        self._listener = listener
        self._origins = origins
        self._connections: dict[_Connection, None] = {}  # in the order they came
        self.on = False
        self.retry_after_s = 1
        """The `Retry-After` of the answers."""
        self.stopping = False
        """Whether no process will serve after this one."""

    def turn_on(self) -> None:
        """Accept connections from now on."""
        if not self.on:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self.on = True

    def turn_off(self) -> None:
        """Accept no more. Accepted connections get their answers."""
        if self.on:
            self._selector.unregister(self._listener)
            self.on = False

    def on_time(self, elapsed_s: float) -> None:
        """Close the connections that have reached the timeout."""
        for connection in tuple(self._connections):
            connection.open_s += elapsed_s
            if connection.open_s > TIMEOUT_S:
                self._close(connection)

    def close(self) -> None:
        """Turn it off and close every connection."""
        self.turn_off()
        for connection in tuple(self._connections):
            self._close(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # the client left, or the process that serves was faster
            return
        accepted.setblocking(False)
        connection = _Connection(accepted)
        if len(self._connections) >= MAX_CONNECTIONS:
            self._close(next(iter(self._connections)))
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        if connection not in self._connections:  # closed since the selector returned
            return
        try:
            data = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        if connection.answered:
            return  # its body: a close with unread bytes would reset the connection and its answer
        connection.head += data
        if b"\r\n\r\n" in connection.head:
            self._answer(connection)
        elif len(connection.head) > MAX_HEAD_BYTES:
            self._close(connection)

    def _answer(self, connection: _Connection) -> None:
        connection.answered = True
        try:
            # The answer is short, so the buffer of a new connection always takes it whole.
            connection.socket.send(
                answer(connection.head, self.retry_after_s, self._origins, stopping=self.stopping)
            )
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()


def answer(
    head: bytes, retry_after_s: int, origins: Sequence[str] = (), *, stopping: bool = False
) -> bytes:
    """The whole response to a request with this head, in the envelope of its API.

    A page of `origins` may read it, so that it sees a restart and not a failure of its own. A
    server that is `stopping` says so, as its process does while it drains.
    """
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    readable = _readable(head, origins)
    if method == b"OPTIONS" and readable:  # before the request that a script wants to send
        lines = ["HTTP/1.1 204 No Content", *readable, "connection: close"]
        return "\r\n".join((*lines, "", "")).encode()
    if path == b"/ping" and not stopping:  # for RunPod: still initializing
        return b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"
    message = "The server is shutting down." if stopping else "The server is being restarted."
    document: dict[str, object]
    if path in (b"/health", b"/ready", b"/ping"):
        document = {"status": "draining" if stopping else "restarting"}
    elif path == b"/v1/messages" or path.startswith(b"/v1/messages/"):
        error = {"type": "overloaded_error", "message": message}
        document = {"type": "error", "error": error, "request_id": ""}
    else:
        error_fields = {"message": message, "type": "server_error", "param": None}
        code = "shutting_down" if stopping else "restarting"
        document = {"error": {**error_fields, "code": code}}
    body = json.dumps(document).encode()
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        *readable,
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"retry-after: {retry_after_s}",
        "connection: close",
    ]
    return "\r\n".join((*lines, "", "")).encode() + (b"" if method == b"HEAD" else body)


def _readable(head: bytes, origins: Sequence[str]) -> list[str]:
    """The headers that let the page behind a request read the answer, if it may."""
    lines = head.decode("latin-1").splitlines()[1:]
    sent = {
        name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)
    }
    origin = sent.get("origin", "")
    if not origin or not (origin in origins or "*" in origins):
        return []
    wanted = sent.get("access-control-request-headers", "*")
    return [
        f"access-control-allow-origin: {origin}",
        "access-control-allow-methods: GET, HEAD, POST, DELETE",
        f"access-control-allow-headers: {wanted}",
        "access-control-expose-headers: retry-after",
        "access-control-max-age: 0",
        "vary: origin",
    ]
