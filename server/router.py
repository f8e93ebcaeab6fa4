"""The router of this server: its functions take the request, and what their path names.

FastAPI's own builds a validator for each parameter of each route, and solves them anew for every
request. Here the only parameters are names in paths, and those are texts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from types import CodeType
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from server.websocket.connection import WebSocketConnection

Endpoint = Callable[..., Awaitable[Any]]
"""A function with the names in its path as parameters, and maybe `request`. It returns a response,
or a document that becomes JSON."""

SocketEndpoint = Callable[..., Awaitable[None]]
"""A function with the names in its path as parameters, and `connection`, which it accepts. An error
that it raises before is an ordinary response. The socket is closed when it returns."""

SocketEndpointT = TypeVar("SocketEndpointT", bound=SocketEndpoint)

EndpointT = TypeVar("EndpointT", bound=Endpoint)


class _Answer:
    """A function of a route as an application. Its errors go to the context of the request."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # `inspect.signature` takes as long as all else that an application is made of.
        code: CodeType = endpoint.__code__
        self._takes_request = "request" in code.co_varnames[: code.co_argcount]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arguments: dict[str, Any] = scope["path_params"]
        if self._takes_request:
            arguments = {**arguments, "request": Request(scope, receive, send)}
        result = await self._endpoint(**arguments)
        response = result if isinstance(result, Response) else json_response(result)
        await response(scope, receive, send)


class ServedRoute(Route):
    """A path, its methods, and the function that answers."""

    methods: set[str]

    def __init__(
        self,
        path: str,
        endpoint: Endpoint,
        methods: Collection[str],
        *,
        name: str | None,
        tags: Sequence[str],
        described: bool,
    ) -> None:
        name = name or endpoint.__name__
        super().__init__(path, _Answer(endpoint), name=name, include_in_schema=described)
        self.methods = set(methods)  # the base class adds HEAD to GET
        self.tags = list(tags)


class _Conversation:
    """A function of a WebSocket's route as an application."""

    def __init__(self, endpoint: SocketEndpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = WebSocketConnection(scope, receive, send)
        arguments: dict[str, Any] = scope["path_params"]
        await connection.run(lambda given: self._endpoint(**arguments, connection=given))


class SocketRoute(WebSocketRoute):
    """The path of a WebSocket, and the function that talks with its client."""

    def __init__(self, path: str, endpoint: SocketEndpoint) -> None:
        super().__init__(path, _Conversation(endpoint), name=endpoint.__name__)


class Router:
    """Routes that are described under the same tag."""

    def __init__(self, *tags: str) -> None:
        self.routes: list[BaseRoute] = []
        self._tags = tags

    def add(
        self,
        path: str,
        endpoint: Endpoint,
        methods: Collection[str],
        *,
        name: str | None = None,
        described: bool = True,
    ) -> None:
        """Answer these methods of a path by a function. Without `described` no document has it."""
        route = ServedRoute(
            path, endpoint, methods, name=name, tags=self._tags, described=described
        )
        self.routes.append(route)

    def route(
        self, path: str, *methods: str, described: bool = True
    ) -> Callable[[EndpointT], EndpointT]:
        """As `add`, as a decorator."""

        def decorate(endpoint: EndpointT) -> EndpointT:
            self.add(path, endpoint, methods, described=described)
            return endpoint

        return decorate

    def get(self, path: str, *, described: bool = True) -> Callable[[EndpointT], EndpointT]:
        """Answer GET."""
        return self.route(path, "GET", described=described)

    def head(self, path: str, *, described: bool = True) -> Callable[[EndpointT], EndpointT]:
        """Answer HEAD."""
        return self.route(path, "HEAD", described=described)

    def post(self, path: str) -> Callable[[EndpointT], EndpointT]:
        """Answer POST."""
        return self.route(path, "POST")

    def websocket(self, path: str) -> Callable[[SocketEndpointT], SocketEndpointT]:
        """Talk with the client of a WebSocket."""

        def decorate(endpoint: SocketEndpointT) -> SocketEndpointT:
            self.routes.append(SocketRoute(path, endpoint))
            return endpoint

        return decorate

    def delete(self, path: str) -> Callable[[EndpointT], EndpointT]:
        """Answer DELETE."""
        return self.route(path, "DELETE")


async def no_route(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """What answers a request that no route takes. Starlette's closes a WebSocket without a word.

    Raises:
        HTTPException: always, for the context of the request.

    """
    raise HTTPException(404)


def json_response(document: Any, headers: dict[str, str] | None = None) -> Response:
    """A document as JSON. Infinity, which JSON does not have, is null."""
    body = to_json(document, inf_nan_mode="null")
    return Response(body, media_type="application/json", headers=headers)
