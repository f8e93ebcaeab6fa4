"""Answers probes while the server itself is still being imported.

Standard library only, as it starts before anything else is imported.
"""

from __future__ import annotations

import selectors
import socket
import threading

MAX_HELD = 1024
"""Connections that are kept for the server. More wait in the queue of the listener."""

_READ_BYTES = 2**16
_STARTING = b'{"status":"starting"}'


def _answer(status: bytes, body: bytes) -> bytes:
    kind = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body) if body else b""
    return b"HTTP/1.1 %s\r\n%sconnection: close\r\n\r\n%s" % (status, kind, body)


_ANSWERS = {
    b"GET /health HTTP/1.": _answer(b"200 OK", _STARTING),
    b"GET /ready HTTP/1.": _answer(b"503 Service Unavailable", _STARTING),
    b"GET /ping HTTP/1.": _answer(b"204 No Content", b""),
}
"""What the server answers while the engine starts."""


class EarlyProbes:
    """A thread that accepts connections of a listener and answers probes.

    It keeps all others, unread, for the server: a page's request, which needs headers for its
    origin, a request that is not complete yet, and whatever is no probe.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._ours, self._theirs = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._held: dict[socket.socket, None] = {}  # in the order they came
        self._thread = threading.Thread(target=self._run, name="early-probes", daemon=True)

    def start(self) -> None:
        """Accept from now on."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._theirs, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> list[socket.socket]:
        """Accept no more, and return the connections without an answer."""
        self._ours.close()
        self._thread.join()
        return [*self._held]

    def _run(self) -> None:
        with self._selector, self._theirs:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._theirs:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._look_at(key.fileobj)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client left
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        self._held[connection] = None
        if len(self._held) == MAX_HELD:
            self._selector.unregister(self._listener)

    def _look_at(self, connection: socket.socket) -> None:
        """Answer a probe. Anything else is left unread."""
        self._selector.unregister(connection)
        try:
            head = connection.recv(_READ_BYTES, socket.MSG_PEEK)
            answer = _answer_to(head)
            if answer is None:
                return
            del self._held[connection]
            connection.recv(len(head))  # a close with unread bytes would reset the connection
            connection.send(answer)  # the buffer of a new connection takes it whole
        except OSError:
            self._held.pop(connection, None)
        connection.close()


def _answer_to(head: bytes) -> bytes | None:
    if not head.endswith(b"\r\n\r\n") or b"\r\norigin:" in head.lower():
        return None
    return next((answer for begin, answer in _ANSWERS.items() if head.startswith(begin)), None)
