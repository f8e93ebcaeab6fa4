"""What a listener gets while the server is still being imported."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from server.supervision.early_probes import EarlyProbes

TIMEOUT_S = 30.0


class Stand:
    """A listener with its early probes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.early = EarlyProbes(self.listener)
        self.early.start()

    def send(self, request: bytes) -> socket.socket:
        """A connection that has sent this."""
        connection = socket.create_connection(self.listener.getsockname(), timeout=TIMEOUT_S)
        connection.sendall(request)
        return connection

    def ask(self, request: bytes) -> bytes:
        """The whole answer."""
        with self.send(request) as connection, connection.makefile("rb") as answer:
            return answer.read()


@pytest.fixture
def stand() -> Iterator[Stand]:
    stand = Stand()
    with stand.listener:
        yield stand
        for connection in stand.early.stop():
            connection.close()


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("health", b"200 OK", b'{"status":"starting"}'),
        ("ready", b"503 Service Unavailable", b'{"status":"starting"}'),
        ("ping", b"204 No Content", b""),
    ],
)
def test_probes_are_answered(stand: Stand, path: str, status: bytes, body: bytes) -> None:
    head, _, rest = stand.ask(f"GET /{path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert head.endswith(b"\r\nconnection: close")
    assert rest == body


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nOrigin: http://page\r\n\r\n",  # a page needs CORS headers
        b"GET /health HTTP/1.1\r\nhost:",
        b"GET /healthy HTTP/1.1\r\n\r\n",
        b"",
    ],
)
def test_anything_else_is_kept_unread_for_the_server(stand: Stand, request_: bytes) -> None:
    with stand.send(request_) as client:
        stand.ask(b"GET /health HTTP/1.1\r\n\r\n")  # so it has looked at the other
        (kept,) = stand.early.stop()
        with kept:
            kept.setblocking(True)
            if request_:
                assert kept.recv(1000) == request_
            kept.sendall(b"an answer")
        assert client.recv(1000) == b"an answer"


def test_a_client_that_left_is_forgotten(stand: Stand) -> None:
    stand.send(b"GET /health HTTP/1.1\r\n\r\n").close()
    stand.ask(b"GET /health HTTP/1.1\r\n\r\n")
    assert stand.early.stop() == []
    with socket.create_connection(stand.listener.getsockname(), timeout=TIMEOUT_S):
        stand.listener.settimeout(TIMEOUT_S)
        stand.listener.accept()[0].close()  # the listener itself stays
