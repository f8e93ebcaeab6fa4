"""The answer to a request that no route takes: what was asked, and what there is instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from starlette.routing import BaseRoute, Match, WebSocketRoute
from starlette.types import Scope

from server.errors import Failure
from server.router import ServedRoute

VERSION = "/v1"
MAX_PATH_CHARS = 200


def unserved(scope: Scope, routes: Iterable[BaseRoute]) -> Failure:
    """405, which lists the methods, if the path is one of a route, otherwise 404.

    The message of a 404 names a path that differs by the beginning only, as base URLs often lack
    `/v1` or have it twice.
    """
    routes = tuple(routes)
    method, path = scope.get("method", "WEBSOCKET"), scope["path"]
    shown = path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}…"
    if any(isinstance(route, WebSocketRoute) and route.path == path for route in routes):
        return Failure.of_status(426, f"{shown} takes WebSockets only.", {"upgrade": "websocket"})
    allowed = _methods(path, routes)
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


def _alternatives(path: str) -> Iterator[str]:
    yield path.rstrip("/")
    yield f"{VERSION}{path}".rstrip("/")
    if path.startswith(f"{VERSION}/"):
        yield path.removeprefix(VERSION).rstrip("/")
