"""The outermost layer of every request: its id, time and metrics, its errors, and its end.

A WebSocket is a request from its handshake until it is closed.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineError, Overloaded
from server.auth import PROBES
from server.errors import Failure, is_anthropic
from server.metrics import HttpMetrics
from server.unserved import unserved
from server.websocket.connection import FAULT, POLICY, RESTART, TRY_LATER, short

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The counted status of a request whose client left before the response (nginx's convention)."""

SOCKET_OPEN = 101
"""The counted status of a WebSocket that was opened."""

_DENIAL = "websocket.http.response"
"""The extension by which a server answers a handshake with an HTTP response."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class _Open:
    """A request whose response is not complete."""

    __slots__ = ("began_s", "clock", "given_up", "receive", "request_id", "scope", "send", "status")

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        request_id: str,
        clock: Callable[[], float],
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.request_id = request_id
        self.clock = clock
        self.began_s = clock()
        self.status = CLIENT_LEFT
        self.given_up = False
        """The application's own response is not sent any more."""

    @property
    def begun(self) -> bool:
        """Whether the response has begun, or the WebSocket is open."""
        return self.status != CLIENT_LEFT

    @property
    def is_socket(self) -> bool:
        """Whether it is a WebSocket."""
        return bool(self.scope["type"] == "websocket")

    @property
    def method(self) -> str:
        """The method of HTTP; a handshake is a GET."""
        return str(self.scope.get("method", "GET"))

    def elapsed_s(self) -> float:
        """Seconds since the head of the request."""
        return self.clock() - self.began_s

    async def pass_on(self, message: Message) -> None:
        """Send a message of the application's response."""
        if not self.given_up:
            await self.send_with_headers(message)

    async def send_with_headers(self, message: Message) -> None:
        """Send a message of the response; the first gets the headers that all responses have."""
        kind = message["type"]
        if kind in ("http.response.start", f"{_DENIAL}.start", "websocket.accept"):
            self.status = message.get("status", SOCKET_OPEN)
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if is_anthropic(self.scope["path"]):
                headers["request-id"] = self.request_id  # the name that its clients read
            headers["openai-processing-ms"] = f"{self.elapsed_s() * 1000:.0f}"
            turn = self.scope["state"].get("turn")
            if turn is not None:
                # Not one by one: each would be looked for among the headers that are there.
                limits = turn.headers().items()
                headers.raw.extend((name.encode(), value.encode()) for name, value in limits)
        elif kind != "websocket.send" and not message.get("more_body"):
            # Before the last piece is sent: its receiver may send the next request at once.
            self.leave()
        await self.send(message)

    def leave(self) -> None:
        """Give back what the request holds of the limits of its key."""
        turn = self.scope["state"].get("turn")
        if turn is not None:
            turn.leave()

    async def answer(self, failure: Failure) -> None:
        """Send the failure as the response. Without that extension a handshake is closed."""
        if self.is_socket and _DENIAL not in self.scope.get("extensions", {}):
            await self.close(POLICY if failure.status < 500 else FAULT, failure.message)
            return
        response = failure.response(self.scope["path"], self.request_id)
        await response(self.scope, self.receive, self.send_with_headers)

    async def close(self, code: int, reason: str) -> None:
        """Close the WebSocket, unless it is."""
        self.given_up = True
        try:
            message = {"type": "websocket.close", "code": code, "reason": short(reason)}
            await self.send_with_headers(message)
        except (OSError, RuntimeError):  # it is closed
            pass


class RequestContext:
    """ASGI middleware: `x-request-id`, `openai-processing-ms`, metrics, log, and errors.

    It also adds the headers of a key's limits, and ends its turn.

    The id is the client's if it is sane, otherwise a new one. It is `request.state.request_id`. An
    error of the application becomes the response, unless one has begun.

    Starlette has a layer for each of these, and each of them passes on every event of every stream.
    Here it is one.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._open: set[_Open] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Measure and count its response."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        request = _Open(scope, receive, send, request_id, self._clock)
        self._open.add(request)
        try:
            await self._app(scope, receive, request.pass_on)
        except ClientDisconnect:
            pass  # the client left while it sent its body
        except Exception as error:
            failure = _failure(error, request)
            # The engine tells all who wait for a load the same error. Each raise would lengthen its
            # traceback, whose frames hold the requests.
            error.__traceback__ = None
            if not request.begun and not request.given_up:
                await request.answer(failure)
            elif request.is_socket and not request.given_up:
                code = TRY_LATER if isinstance(error, Overloaded) else FAULT
                await request.close(code, failure.message)
        finally:
            self._open.discard(request)
            request.leave()
            self._count(request)

    async def give_up(self, error: EngineError) -> None:
        """Answer every request without a response with `error`. Cut off no begun response.

        Open WebSockets are closed with 1012, after which clients connect again.

        A process that must end does this: its clients try again after `Retry-After`. A broken
        connection would give them no such answer.
        """
        for request in tuple(self._open):
            if not request.begun and not request.given_up:
                request.given_up = True
                await request.answer(Failure.of(error))
            elif request.is_socket and not request.given_up:
                await request.close(RESTART, error.message)

    def _count(self, request: _Open) -> None:
        scope, elapsed_s = request.scope, request.elapsed_s()
        route = getattr(scope.get("route"), "path", None)
        self._metrics.observe(route, request.method, request.status, elapsed_s)
        logger.log(
            logging.DEBUG if scope["path"] in PROBES else logging.INFO,
            "%s %s %d in %.0f ms (%s)",
            request.method,
            quote(scope["path"]),
            request.status,
            elapsed_s * 1000,
            request.request_id,
        )


def _failure(error: Exception, request: _Open) -> Failure:
    """What the client is told of an error. What is the server's own is logged."""
    if isinstance(error, HTTPException) and not request.begun:
        if error.status_code in (404, 405) and error.detail == HTTPStatus(error.status_code).phrase:
            return unserved(request.scope, request.scope["app"].routes)
        return Failure.of_status(error.status_code, str(error.detail), error.headers or {})
    failure = Failure.of(error)
    if not isinstance(error, EngineError) or request.begun:
        logger.error("request %s failed unexpectedly", request.request_id, exc_info=error)
    elif failure.status >= 500 and not isinstance(error, Overloaded):
        logger.error("request %s failed: %s", request.request_id, error)
    return failure
