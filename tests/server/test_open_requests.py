"""Requests that are given up: who gets which answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.errors import ShuttingDown
from engine.events import Event, Frame
from engine.requests import TextRequest
from server.open_requests import OpenRequests
from tests.server.fake import FakeRuntime, listening
from tests.server.serve_fake import wait_for_pipe

CHAT = "/v1/chat/completions"


@pytest.fixture
def requests(app: FastAPI) -> OpenRequests:
    return OpenRequests(app)


def serving(requests: OpenRequests) -> AbstractAsyncContextManager[str]:
    app: Any = requests
    return listening(app)


async def test_who_waits_is_told_to_come_again(
    requests: OpenRequests, runtime: FakeRuntime
) -> None:
    begun = asyncio.Event()

    async def never(request: TextRequest) -> AsyncGenerator[Event, None]:
        begun.set()
        await asyncio.Event().wait()
        yield Frame("")

    runtime.answer = never
    async with serving(requests) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        waiting = asyncio.create_task(client.post(CHAT, json={"model": "small"}))
        await begun.wait()
        queued = asyncio.create_task(client.post("/v1/messages", json={"model": "small"}))
        while not (await client.get("/v1/engine")).json()["queue"]:
            pass
        await requests.give_up(ShuttingDown("The server is being restarted.", retry_after_s=5))
        for answer, kind in ((await waiting, "server_error"), (await queued, "overloaded_error")):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["type"] == kind


async def test_a_stream_that_has_begun_gets_no_second_answer(
    requests: OpenRequests, runtime: FakeRuntime
) -> None:
    runtime.answer = wait_for_pipe
    async with serving(requests) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        body = {"model": "small", "stream": True}
        async with client.stream("POST", CHAT, json=body) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == "data: first"
            await requests.give_up(ShuttingDown("Restarting.", retry_after_s=5))
            assert [request.begun for request in requests._open] == [True]
            assert not requests._given_up


async def test_nothing_is_kept_of_what_was_answered(requests: OpenRequests) -> None:
    async with serving(requests) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        assert (await client.get("/health")).status_code == 200
    assert not requests._open
