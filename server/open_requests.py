"""The requests without a response: they get a 503 when the process must end."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineError
from server.errors import Failure


@dataclass(slots=True, eq=False)
class _Open:
    scope: Scope
    receive: Receive
    send: Send
    begun: bool = False
    """Whether the response has begun, from the application or from here."""


class OpenRequests:
    """ASGI middleware that can answer in the application's place.

    A process that gives up answers its open requests with an error. Their clients then retry after
    `Retry-After`. A broken connection would give them no such answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: set[_Open] = set()
        self._given_up: set[_Open] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Open(scope, receive, send)

        async def send_unless_answered(message: Message) -> None:
            if request in self._given_up:
                return
            request.begun = True
            await send(message)

        self._open.add(request)
        try:
            await self._app(scope, receive, send_unless_answered)
        finally:
            self._open.discard(request)
            self._given_up.discard(request)

    async def give_up(self, error: EngineError) -> None:
        """Answer every request without a response with `error`. Cut off no begun response."""
        for request in tuple(self._open):
            if not request.begun:
                self._given_up.add(request)
                request_id = request.scope.get("state", {}).get("request_id", "")
                response = Failure.of(error).response(request.scope["path"], request_id)
                await response(request.scope, request.receive, request.send)
