"""What happens to the work when the client leaves, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from engine.engine import Engine
from engine.events import Document, Event, Frame
from engine.requests import TextRequest
from server.connection import run_while_connected
from tests.server.fake import FakeRuntime

CHAT = "/v1/chat/completions"
TIMEOUT_S = 60


class Stuck:
    """An answer that never ends by itself, and tells when it began and when it was cancelled."""

    def __init__(self, *frames: str) -> None:
        self.frames = frames
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        try:
            for frame in self.frames:
                yield Frame(frame)
            self.began.set()
            await asyncio.Event().wait()
        finally:
            self.ended.set()


async def wait_for(event: asyncio.Event) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        await event.wait()


async def answers_again(url: str, runtime: FakeRuntime) -> bool:
    """Whether the one place on the model is free: a lease left behind would hold it."""

    async def at_once(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Document(b"{}")

    runtime.answer = at_once
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        return (await client.post(CHAT, json={"model": "small"})).status_code == 200


async def test_client_leaves_before_the_first_event(url: str, runtime: FakeRuntime) -> None:
    stuck = runtime.answer = Stuck()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        call = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
        await wait_for(stuck.began)
        call.cancel()
        await asyncio.wait([call])
    await wait_for(stuck.ended)
    assert await answers_again(url, runtime)


async def test_client_leaves_while_it_waits_for_a_place(
    url: str, engine: Engine, runtime: FakeRuntime
) -> None:
    stuck = runtime.answer = Stuck()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        runs = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
        await wait_for(stuck.began)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(CHAT, json={"model": "small"}, timeout=0.2)
        # Listed and answered by the same loop, after the disconnect was read.
        async with asyncio.timeout(TIMEOUT_S):
            while (await client.get("/v1/engine")).json()["queue"]:
                pass
        assert not stuck.ended.is_set()
        assert len(runtime.requests) == 1
        runs.cancel()
        await asyncio.wait([runs])
    await wait_for(stuck.ended)


async def test_client_leaves_a_stream_that_is_silent(
    url: str, engine: Engine, runtime: FakeRuntime
) -> None:
    stuck = runtime.answer = Stuck("data: 1\n\n")
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json={"model": "small"}) as answer,
    ):
        async for text in answer.aiter_text():
            assert text == "data: 1\n\n"
            break
        await wait_for(stuck.began)
        assert engine.model_status("small").leases == 1
    await wait_for(stuck.ended)
    assert await answers_again(url, runtime)


async def test_client_leaves_a_stream_that_floods(url: str, runtime: FakeRuntime) -> None:
    ended = asyncio.Event()

    async def flood(request: TextRequest) -> AsyncGenerator[Event, None]:
        try:
            while True:
                await asyncio.sleep(0)  # as any real source lets the loop turn
                yield Frame("x" * 2**16)  # fills the socket, so that the send itself waits
        finally:
            ended.set()

    runtime.answer = flood
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json={"model": "small"}),
    ):
        pass
    await wait_for(ended)
    assert await answers_again(url, runtime)


async def test_frames_are_sent_one_by_one(url: str, runtime: FakeRuntime) -> None:
    read = asyncio.Event()

    async def waits_for_the_reader(request: TextRequest) -> AsyncGenerator[Event, None]:
        yield Frame("data: 1\n\n")
        await read.wait()
        yield Frame("data: 2\n\n")

    runtime.answer = waits_for_the_reader
    got = []
    async with (
        asyncio.timeout(TIMEOUT_S),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json={"model": "small"}) as answer,
    ):
        async for text in answer.aiter_text():
            got.append(text)
            read.set()
    assert got == ["data: 1\n\n", "data: 2\n\n"]


async def test_client_leaves_before_the_head_is_sent(
    client: httpx.AsyncClient, app: FastAPI, engine: Engine, runtime: FakeRuntime
) -> None:
    runtime.answer = Stuck("data: 1\n\n")
    sending = asyncio.Event()

    async def receive() -> Message:
        if body:
            return body.pop()
        await sending.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sending.set()
        await asyncio.Event().wait()

    body = [{"type": "http.request", "body": b'{"model": "small"}', "more_body": False}]
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [],
        "query_string": b"",
    }
    async with asyncio.timeout(TIMEOUT_S):
        await app(scope, receive, send)
    assert sending.is_set()
    assert engine.model_status("small").leases == 0


class Wire:
    """An ASGI `receive` that the test ends."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_clean_up_of_cancelled_work_completes() -> None:
    wire, steps = Wire(), []

    async def work() -> None:
        try:
            wire.gone.set()
            await asyncio.Event().wait()
        finally:
            for step in range(3):
                await asyncio.sleep(0)
                steps.append(step)

    await run_while_connected(work(), wire.receive)
    assert steps == [0, 1, 2]


async def test_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await run_while_connected(work(), Wire().receive)


async def test_cancelled_from_outside_the_work_is_cancelled_too() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(run_while_connected(work(), Wire().receive))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
