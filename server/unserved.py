"""The answer to a request that no route takes: what was asked, and what there is instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from server.errors import Failure
from server.router import ServedRoute, SocketRoute

VERSION = "/v1"
MAX_PATH_CHARS = 200


def unserved(scope: Scope, routes: Iterable[BaseRoute]) -> Failure:
    """405, which lists the methods, if the path is one of a route, otherwise 404.

    A GET of a path for WebSockets is 426, as its handshake is a GET with an upgrade.
    The message of a 404 names a path that differs by the beginning only, as base URLs often lack
    `/v1` or have it twice.
    """
    routes = tuple(routes)
    method, path = scope.get("method", "GET"), scope["path"]
    shown = path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}…"
    allowed = _methods(path, routes)
    if scope["type"] == "websocket" and allowed:
        allow = ", ".join(sorted(allowed))
        return Failure.of_status(405, f"{shown} takes {allow}, no WebSocket.", {"allow": allow})
    if _is_socket(path, routes) and not allowed:
        if method == "GET":
            message = f"{shown} is a WebSocket: connect to it by ws:// or wss://."
            return Failure.of_status(426, message, {"upgrade": "websocket"})
        message = f"{shown} takes a WebSocket, not {method}."
        return Failure.of_status(405, message, {"allow": "GET"})
    if method in allowed:  # a route took it, and has nothing of that name
        return Failure.of_status(404, f"There is no {shown}.", {})
    if allowed:
        allow = ", ".join(sorted(allowed))
        return Failure.of_status(405, f"{shown} takes {allow}, not {method}.", {"allow": allow})
    meant = next((each for each in _alternatives(path) if method in _methods(each, routes)), None)
    hint = f" Did you mean {meant}?" if meant else " GET /openapi.json lists what there is."
    return Failure.of_status(404, f"Nothing is served at {method} {shown}.{hint}", {})


def _methods(path: str, routes: Iterable[BaseRoute]) -> set[str]:
    found: set[str] = set()
    for route in routes:
        if isinstance(route, ServedRoute):
            scope = {"type": "http", "method": "", "path": path, "headers": []}
            if route.matches(scope)[0] is not Match.NONE:
                found |= route.methods
    return found


def _is_socket(path: str, routes: Iterable[BaseRoute]) -> bool:
    scope = {"type": "websocket", "path": path, "headers": []}
    return any(
        isinstance(route, SocketRoute) and route.matches(scope)[0] is not Match.NONE
        for route in routes
    )


def _alternatives(path: str) -> Iterator[str]:
    yield path.rstrip("/")
    yield f"{VERSION}{path}".rstrip("/")
    if path.startswith(f"{VERSION}/"):
        yield path.removeprefix(VERSION).rstrip("/")
