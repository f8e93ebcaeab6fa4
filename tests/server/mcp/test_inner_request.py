"""A request that the server makes of itself: what it has of the outer one, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.mcp import inner_request
from server.mcp.inner_request import Answer, InnerRequest

LIMIT_S = 30.0
PIECES = (b"one", b"two", b"six")


class Endpoint:
    """Answers with three pieces, of which the last may be missing, and waits for its client."""

    def __init__(self, *, ends: bool = True, waits: bool = False) -> None:
        self.ends = ends
        self.waits = waits
        self.scope: Scope = {}
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.asked.append(dict(await receive()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in PIECES:
            last = self.ends and piece is PIECES[-1]
            await send({"type": "http.response.body", "body": piece, "more_body": not last})
        if self.waits:
            self.asked.append(dict(await receive()))


async def answer_of(endpoint: Endpoint, *headers: tuple[bytes, bytes]) -> Answer:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": "POST", "path": "/mcp", "headers": headers, "app": endpoint,
    }  # fmt: skip
    inner = InnerRequest(Request(scope), "POST", "/v1/a", "b=c", b"{}")
    async with asyncio.timeout(LIMIT_S):
        return await inner.start()


async def test_it_has_the_key_and_options_of_the_outer_one() -> None:
    endpoint = Endpoint()
    kept = [(b"authorization", b"Bearer k"), (b"x-roundhouse-priority", b"batch")]
    own = (b"x-request-id", b"content-type", b"content-length", b"mcp-session-id", b"traceparent")
    answer = await answer_of(endpoint, *kept, *((name, b"outer") for name in own))
    assert (answer.status, answer.body, answer.complete) == (200, b"".join(PIECES), True)
    headers = endpoint.scope["headers"]
    assert headers[:2] == kept and b"outer" not in dict(headers).values()
    given = dict(headers)
    assert given[b"content-type"] == b"application/json" and given[b"content-length"] == b"2"
    assert given[b"x-request-id"].startswith(b"mcp-") and len(headers) == len(given) == 5
    assert (endpoint.scope["path"], endpoint.scope["query_string"]) == ("/v1/a", b"b=c")
    assert endpoint.asked == [{"type": "http.request", "body": b"{}", "more_body": False}]


async def test_half_an_answer_is_known() -> None:
    answer = await answer_of(Endpoint(ends=False))
    assert not answer.complete


async def test_an_answer_that_is_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_request, "MAX_ANSWER_BYTES", 8)
    endpoint = Endpoint(waits=True)
    answer = await answer_of(endpoint)
    assert not answer.complete and answer.body == b""
    assert endpoint.asked[-1] == {"type": "http.disconnect"}
