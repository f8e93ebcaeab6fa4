"""Access to the server: by keys, and without keys only from this machine.

With keys, of the configuration or of the store, every route needs one, except the probes, the pages
`/` and `/docs`, and the files of finished images. The routes that change the engine need an admin
key. A key of the store may be limited to endpoints, to models, and in its rate. Without keys the
server is open to programs on this machine. It is not open to other web pages in a browser: a page
may send requests to loopback addresses, and a host name may be rebound to one. The settings
`public_url` and `cors_origins` name the hosts and pages that are meant to reach it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Failure
from server.keys.access import EVERYTHING, Access
from server.keys.client_secrets import (
    REALTIME_PATH,
    SECRET_PREFIX,
    ClientSecret,
    ClientSecrets,
)
from server.keys.endpoints import WEBSOCKET, is_counted
from server.keys.keyring import Keyring
from server.keys.limiter import Refusal, Turn
from server.settings import ANY, ServerSettings, is_loopback
from server.websocket.connection import KEY_SUBPROTOCOL

HOST_NAMES_IN_CONTAINERS = frozenset({"host.docker.internal", "host.containers.internal"})
"""The names by which a container reaches this machine. Nobody can register a name in `.internal`,
so a web page cannot rebind one."""

PROBES = frozenset({"/health", "/ready", "/ping"})
WEB_PATH = "/"
WEB_FILES_PREFIX = "/web/"
DOCS_PATH = "/docs"
DOCS_FILES_PREFIX = "/docs/"
WELL_KNOWN_PREFIX = "/.well-known/"
"""Pages and their files hold no secret. A page requests its data with the key that it gets.
Clients of MCP look below `/.well-known/` for a login. The answer is 404: a key is all there is."""
ADMIN_PREFIX = "/v1/engine/"
PLAN_PATH = "/v1/engine/plan"
ROUTE_PATH = "/v1/engine/route"
"""They change nothing, though they are a POST, so any key may use them."""
OLLAMA_ADMIN_PATHS = frozenset(
    f"/api/{action}" for action in ("pull", "delete", "copy", "create", "push")
)
"""Ollama's routes that change what models there are."""
IMAGE_FILES_PREFIX = "/v1/images/files/"
"""Read without a key, so that a browser can show an image. Nobody can guess the names (256 bits),
so the URL itself is the permission."""


class Guard:
    """ASGI middleware that lets a request through or answers 401, 403 or 429.

    It puts what the sender may do at `request.state.access`, whose caller is also at
    `request.state.caller`. For a key with limits there is a `request.state.turn`, which the context
    of the request ends. A WebSocket is one request, for as long as it is open. Browsers set no
    headers of one, so its key may also be among its subprotocols. What a client secret stands for
    is at `request.state.client_secret`.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, keyring: Keyring, secrets: ClientSecrets
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._secrets = secrets
        self._local = is_loopback(settings.host)
        self._open = self._local or settings.insecure
        self._origins = frozenset(settings.cors_origins)
        self._public_host = _hostname(settings.public_url or "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer for it."""
        if scope["type"] != "lifespan":
            failure = self._refusal(scope)
            if failure is not None:
                response = failure.response(scope["path"], scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Failure | None:
        method, path = scope.get("method", WEBSOCKET), scope["path"]
        headers = Headers(scope=scope)
        admin = is_admin(method, path)
        presented = _presented_keys(headers, scope.get("subprotocols", ()))
        # Beyond this machine a server without keys is open only if that was wanted. It may have
        # begun with keys of the store, and lost them since.
        if not self._keyring and self._open:
            refused = self._refusal_without_keys(headers, admin=admin)
            if refused is None and path == REALTIME_PATH:
                opened = self._open_by_secret(presented, scope)
                refused = opened if isinstance(opened, Failure) else None
            return refused
        if is_open(method, path):
            return None
        access = self._open_by_secret(presented, scope) or self._access(presented)
        if isinstance(access, Failure):
            return access
        state = scope["state"]
        state["access"], state["caller"] = access, access.caller
        if access.limiter is not None:
            state["turn"] = Turn(access.limiter)
        if admin and not access.admin:
            return _forbidden(
                "This needs an admin key (server.admin_keys, or `roundhouse keys add --admin`).",
                "admin_key_required",
            )
        if not access.may_call(path):
            return forbidden_endpoint(path)
        if access.limiter is not None and is_counted(method, path):
            refusal = state["turn"].enter()
            if refusal is not None:
                return limited(refusal)
        return None

    def _open_by_secret(self, presented: list[str], scope: Scope) -> Access | Failure | None:
        """What a client secret among the presented keys opens; None: there is none among them."""
        for key in presented:
            if key.startswith(SECRET_PREFIX) and self._keyring.find(key) is None:
                return self._opened(self._secrets.find(key), scope)
        return None

    def _opened(self, secret: ClientSecret | None, scope: Scope) -> Access | Failure:
        """What a client secret opens: what its key may do, but at one path."""
        if secret is None:
            return unauthorized("This client secret is unknown, or it has expired.")
        if scope["path"] != REALTIME_PATH:
            return _forbidden(f"A client secret opens {REALTIME_PATH} only.", "endpoint_forbidden")
        access = self._keyring.of_digest(secret.owner)
        if access is None and not secret.owner and not self._keyring:
            access = EVERYTHING
        if access is None:
            return unauthorized("The key that made this client secret is not accepted any more.")
        now = time.time()
        ended = access.ended(now)
        if ended is not None:
            return unauthorized(ended)
        if secret.owner:
            access.used_at = now
        scope["state"]["client_secret"] = secret
        return access

    def _access(self, presented: list[str]) -> Access | Failure:
        """What the presented key may do. Of several valid ones an admin's counts, or the first."""
        if not presented:
            return unauthorized(
                "No API key given. Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
            )
        now = time.time()
        found: Access | None = None
        reason = None
        for key in presented:
            access = self._keyring.find(key)
            if access is None:
                continue
            ended = access.ended(now)
            if ended is not None:
                reason = ended
            elif found is None or (access.admin and not found.admin):
                found = access
        if found is None:
            return unauthorized(reason or "Incorrect API key.")
        found.used_at = now
        return found

    def _refusal_without_keys(self, headers: Headers, *, admin: bool) -> Failure | None:
        host = headers.get("host")
        hostname = _hostname(f"//{host}") if host else None
        if self._local and host is not None and not self._is_own_name(hostname):
            return _forbidden(
                "Without API keys only names of this machine are answered, such as localhost. Set"
                " server.api_keys, or server.public_url to the address of the proxy before it.",
                "host_forbidden",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own_page(origin, hostname, admin=admin):
            return _forbidden(
                "Without API keys requests of other web pages are refused, unless"
                " server.cors_origins names them.",
                "origin_forbidden",
            )
        if admin and not self._local:
            return _forbidden("This needs an admin key (server.admin_keys).", "admin_key_required")
        return None

    def _is_own_name(self, hostname: str | None) -> bool:
        return hostname is not None and (
            is_loopback(hostname)
            or hostname in HOST_NAMES_IN_CONTAINERS
            or hostname == self._public_host
        )

    def _is_own_page(self, origin: str, hostname: str | None, *, admin: bool) -> bool:
        """Whether a page may use the server without a key. `*` opens it to no orders of pages."""
        if origin in self._origins or (ANY in self._origins and not admin):
            return True
        page = _hostname(origin)
        return page is not None and (is_loopback(page) or page in (hostname, self._public_host))


def is_admin(method: str, path: str) -> bool:
    """Whether a request needs an admin key."""
    changes = method not in ("GET", "HEAD", WEBSOCKET) and path not in (PLAN_PATH, ROUTE_PATH)
    return changes and (path.startswith(ADMIN_PREFIX) or path in OLLAMA_ADMIN_PATHS)


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key at all, even with configured keys."""
    if path in PROBES:
        return True
    prefixes = (WEB_FILES_PREFIX, DOCS_FILES_PREFIX, WELL_KNOWN_PREFIX, IMAGE_FILES_PREFIX)
    return method in ("GET", "HEAD") and (
        path in (WEB_PATH, DOCS_PATH) or path.startswith(prefixes)
    )


def _presented_keys(headers: Headers, subprotocols: Iterable[str]) -> list[str]:
    keys = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(key.strip())
    keys += [
        each.removeprefix(KEY_SUBPROTOCOL)
        for each in subprotocols
        if each.startswith(KEY_SUBPROTOCOL)
    ]
    return [key for key in keys if key]


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def unauthorized(message: str) -> Failure:
    """The failure for a key that opens nothing."""
    return Failure(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _forbidden(message: str, code: str) -> Failure:
    return Failure(403, message, code=code)


def forbidden_endpoint(path: str) -> Failure:
    """The failure for a key that may not call the endpoint."""
    return _forbidden(f"This API key may not use {path}.", "endpoint_forbidden")


def limited(refusal: Refusal) -> Failure:
    """The failure for a key that is over a limit."""
    wait_s = max(1, math.ceil(refusal.retry_after_s))
    return Failure(
        429,
        refusal.message,
        "rate_limit_error",
        "rate_limit_exceeded",
        headers={"retry-after": str(wait_s)},
    )
