"""Sends the request of a line through the application, in this process, as its key would.

So the checks of the endpoint, the scopes and limits of the key, its budget, routes, fallbacks,
costs, metrics and the log are those of any request. Only the key itself is not there: a batch knows
its name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.requests import Priority
from server.auth import forbidden_endpoint, limited, unauthorized
from server.headers import HEADER_PREFIX
from server.keys.access import EVERYTHING, Access
from server.keys.keyring import Keyring
from server.keys.limiter import Turn
from server.metrics import HttpMetrics
from server.request_context import RequestContext

_OWNER = "batch_owner"


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What an endpoint answered."""

    status: int
    headers: Headers
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether it is a success."""
        return 200 <= self.status < 300


class _NameGuard:
    """The guard of requests that come with the name of a key."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, path = scope["state"], scope["path"]
        access = access_of_owner(self._keyring, state.pop(_OWNER))
        failure = None
        ended = (
            "There is no such API key any more." if access is None else access.ended(time.time())
        )
        if access is None or ended is not None:
            failure = unauthorized(ended or "")
        else:
            state["access"], state["caller"] = access, access.caller
            if not access.may_call(path):
                failure = forbidden_endpoint(path)
            elif access.limiter is not None:
                state["turn"] = Turn(access.limiter)
                refusal = state["turn"].enter()
                failure = None if refusal is None else limited(refusal)
        if failure is not None:
            await failure.response(path, state["request_id"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def access_of_owner(keyring: Keyring, owner: str) -> Access | None:
    """What a key may do now, by its name; None if it is gone. Without a name it was made openly."""
    return keyring.named(owner) if owner else EVERYTHING


class LineCalls:
    """Calls endpoints for the keys of batches."""

    def __init__(
        self, app: ASGIApp, router: ASGIApp, keyring: Keyring, metrics: HttpMetrics
    ) -> None:
        self._app = app
        self._context = RequestContext(_NameGuard(router, keyring), metrics)

    async def post(
        self, owner: str, path: str, body: bytes, content_type: str, request_id: str
    ) -> LineAnswer:
        """The answer to one request. If this is cancelled, the request is."""
        left = asyncio.Event()
        sent = False
        status, headers, pieces = 0, Headers(), []  # type: int, Headers, list[bytes]

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            else:
                pieces.append(message.get("body", b""))

        own: Mapping[str, str] = {
            "content-type": content_type,
            "content-length": str(len(body)),
            "x-request-id": request_id,
            HEADER_PREFIX + "priority": Priority.BATCH.name.lower(),
        }
        scope = {
            "type": "http",
            "app": self._app,
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in own.items()],
            "client": None,
            "server": None,
            "state": {_OWNER: owner},
        }
        await self._context(scope, receive, send)
        return LineAnswer(status, headers, b"".join(pieces))
