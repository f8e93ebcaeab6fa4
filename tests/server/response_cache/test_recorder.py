"""What is kept of the messages of an answer."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import Response

from server.response_cache.entry import Entry
from server.response_cache.recorder import Recorder
from server.sse import EventStream

CACHE = (b"x-roundhouse-cache", b"miss")


class Exchange:
    """What was sent, and what was kept."""

    def __init__(self, max_bytes: int = 100) -> None:
        self.sent: list[dict[str, Any]] = []
        self.kept: list[Entry] = []
        self.sent_before: list[int] = []
        self.recorder = Recorder(self.send, "miss", max_bytes, self.keep)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def keep(self, entry: Entry) -> None:
        self.kept.append(entry)
        self.sent_before.append(len(self.sent))


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


async def test_a_stream(exchange: Exchange) -> None:
    stream = EventStream(exchange.recorder)
    await stream.begin({"x-roundhouse-run-ms": "5", "x-roundhouse-cut": "prompt=1/2"})
    await stream.send("data: one\n\n")
    await stream.send("data: two\n\n")
    assert exchange.kept == []
    await stream.end()
    headers = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "x-roundhouse-cut": "prompt=1/2",
    }
    pieces = (b"data: one\n\n", b"data: two\n\n")
    assert exchange.kept == [Entry(200, headers, pieces, streamed=True)]
    assert exchange.sent_before == [3], "the last piece ends the task that sends it"
    assert CACHE in exchange.sent[0]["headers"]
    assert len(exchange.sent) == 4


async def test_a_wait_is_not_replayed(exchange: Exchange) -> None:
    stream = EventStream(exchange.recorder)
    await stream.begin({})
    await stream.send(": queued position=1\n\n")
    await stream.send("data: one\n\n")
    await stream.end()
    assert [entry.pieces for entry in exchange.kept] == [(b"data: one\n\n",)]
    assert len(exchange.sent) == 4


async def test_a_stream_that_failed(exchange: Exchange) -> None:
    stream = EventStream(exchange.recorder)
    await stream.begin({})
    await stream.send("data: one\n\n")
    await stream.end(failed=True)
    assert exchange.kept == []


async def test_a_stream_that_is_too_long() -> None:
    exchange = Exchange(max_bytes=10)
    stream = EventStream(exchange.recorder)
    await stream.begin({})
    for _ in range(3):
        await stream.send("data: one\n\n")
    await stream.end()
    assert exchange.kept == []
    assert len(exchange.sent) == 5


async def test_another_status(exchange: Exchange) -> None:
    await exchange.recorder({"type": "http.response.start", "status": 206, "headers": []})
    await exchange.recorder({"type": "http.response.body", "body": b"part"})
    assert exchange.kept == []
    assert len(exchange.sent) == 2


@pytest.mark.parametrize(
    ("status", "body", "kept"),
    [(200, b"x" * 100, True), (200, b"x" * 101, False), (404, b"x", False)],
)
def test_a_whole_answer(exchange: Exchange, status: int, body: bytes, kept: bool) -> None:
    response = exchange.recorder.whole(Response(body, status))
    assert response.headers["x-roundhouse-cache"] == "miss"
    assert bool(exchange.kept) is kept
