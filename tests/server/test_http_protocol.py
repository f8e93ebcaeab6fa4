"""A client that does not read is cut off, and holds no model; one that reads slowly is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI

from engine.engine import Engine
from engine.events import Document, Event, Frame
from engine.requests import TextRequest
from server.http_protocol import http_protocol
from tests.server.fake import FakeRuntime, listening

CHAT = "/v1/chat/completions"
TIMEOUT_S = 20.0


async def test_a_client_that_does_not_read_does_not_keep_the_model(
    app: FastAPI, engine: Engine, runtime: FakeRuntime
) -> None:
    ended = asyncio.Event()

    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        if not request.body.get("stream"):
            yield Document(b"{}")
            return
        try:
            while True:  # only a closed connection ends it
                yield Frame(f"data: {'x' * 200_000}\n\n")
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    runtime.answer = answer
    async with listening(app, http_protocol(0.2)) as url:
        port = int(url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = json.dumps({"model": "small", "messages": [], "stream": True})
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write((head + body).encode())
        await writer.drain()  # and it never reads
        async with asyncio.timeout(TIMEOUT_S):
            await ended.wait()
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            second = await client.post(f"{url}{CHAT}", json={"model": "small", "messages": []})
        assert second.status_code == 200
        assert engine.model_status("small").leases == 0
        writer.transport.abort()


class Transport:
    """A write buffer that the test fills and empties."""

    def __init__(self, sizes: Iterator[int]) -> None:
        self._sizes = sizes
        self.looks = 0
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.looks += 1
        return next(self._sizes)

    def abort(self) -> None:
        self.aborted.set()


def protocol(transport: Transport) -> Any:
    kind = http_protocol(0.01)
    made: Any = kind.__new__(kind)
    made.transport = transport
    made.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
    return made


async def test_a_client_that_reads_slowly_is_served() -> None:
    transport = Transport(iter([900, 700, 699, 100, 100]))
    protocol(transport).pause_writing()
    async with asyncio.timeout(TIMEOUT_S):
        await transport.aborted.wait()
    assert transport.looks == 5  # each look but the last found it smaller


async def test_a_client_that_catches_up_is_not_watched() -> None:
    transport = Transport(iter([900]))
    made = protocol(transport)
    made.pause_writing()
    made.resume_writing()
    assert made._watch is None
