"""A provider on real sockets that behaves, or misbehaves, as a test says."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """What a behaviour writes to."""

    def __init__(self, writer: asyncio.StreamWriter, left: asyncio.Event) -> None:
        self._writer = writer
        self.left = left
        """Set when the client has closed the connection."""

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {kind}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def chunk(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def reset(self) -> None:
        """End the connection with RST."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Behaviour = Callable[[Received, Wire], Awaitable[None]]


def answers(document: Any, status: int = 200, **headers: str) -> Behaviour:
    """A whole document; text is sent as it is."""
    body = document.encode() if isinstance(document, str) else json.dumps(document).encode()

    async def behave(_: Received, wire: Wire) -> None:
        await wire.head(status, content_length=str(len(body)), **headers)
        await wire.raw(body)

    return behave


def streams(*pieces: str | bytes, kind: str = "text/event-stream", ends: bool = True) -> Behaviour:
    """Pieces of a body, each on its own. Without `ends` the connection breaks after the last."""

    async def behave(_: Received, wire: Wire) -> None:
        await wire.head(kind=kind, transfer_encoding="chunked")
        for piece in pieces:
            await wire.chunk(piece)
            await asyncio.sleep(0)
        if ends:
            await wire.raw(b"0\r\n\r\n")
        else:
            wire.reset()

    return behave


async def hangs(_: Received, wire: Wire) -> None:
    """Never answer."""
    await wire.left.wait()


def hangs_after(*pieces: str) -> Behaviour:
    """Begin a stream and fall silent."""

    async def behave(_: Received, wire: Wire) -> None:
        await wire.head(kind="text/event-stream", transfer_encoding="chunked")
        for piece in pieces:
            await wire.chunk(piece)
        await wire.left.wait()

    return behave


async def resets(_: Received, wire: Wire) -> None:
    """Break the connection before the answer."""
    wire.reset()


class Upstream:
    """Takes one behaviour a request from `script`, then `usual`."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Received] = []
        self.script: list[Behaviour] = []
        self.usual: Behaviour = answers({})
        self.left = asyncio.Event()
        """Set when a client has closed a connection during an answer."""
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (received := await self._read(reader)) is not None:
                self.requests.append(received)
                behave = self.script.pop(0) if self.script else self.usual
                left = asyncio.Event()
                watch = asyncio.create_task(self._watch(reader, left))
                try:
                    await behave(received, Wire(writer, left))
                finally:
                    watch.cancel()
                    await asyncio.wait([watch])
                if left.is_set():
                    self.left.set()
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            writer.close()

    @staticmethod
    async def _watch(reader: asyncio.StreamReader, left: asyncio.Event) -> None:
        # The client sends nothing more before it has the answer: whatever comes is its end.
        while not reader.at_eof():
            if not await reader.read(1):
                break
        left.set()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Received | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (each.partition(":") for each in lines)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Received(method, path, headers, body)


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    """A provider on loopback."""
    found = Upstream()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await found.serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield found
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
