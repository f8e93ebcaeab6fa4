"""Access to the server: by keys, and without keys only from this machine.

With configured keys every route needs one, except the probes, the pages `/` and `/docs`, and the
files of finished images. The routes that change the engine need an admin key. Without keys the
server is open to programs on this machine. It is not open to other web pages in a browser: a page
may send requests to loopback addresses, and a host name may be rebound to one. The settings
`public_url` and `cors_origins` name the hosts and pages that are meant to reach it.
"""

from __future__ import annotations

import hashlib
import hmac
from enum import IntEnum
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Failure
from server.settings import ANY, ServerSettings, is_loopback

HOST_NAMES_IN_CONTAINERS = frozenset({"host.docker.internal", "host.containers.internal"})
"""The names by which a container reaches this machine. Nobody can register a name in `.internal`,
so a web page cannot rebind one."""

PROBES = frozenset({"/health", "/ready", "/ping"})
WEB_PATH = "/"
WEB_FILES_PREFIX = "/web/"
DOCS_PATH = "/docs"
DOCS_FILES_PREFIX = "/docs/"
"""Pages and their files hold no secret. A page requests its data with the key that it gets."""
ADMIN_PREFIX = "/v1/engine/"
PLAN_PATH = "/v1/engine/plan"
"""It changes nothing, though it is a POST, so any key may use it."""
IMAGE_FILES_PREFIX = "/v1/images/files/"
"""Read without a key, so that a browser can show an image. Nobody can guess the names (256 bits),
so the URL itself is the permission."""


class Role(IntEnum):
    """What a caller may do. Each role may do what the lower ones may."""

    NOBODY = 0
    USER = 1
    ADMIN = 2


class Keyring:
    """The configured keys, kept as digests."""

    def __init__(self, settings: ServerSettings) -> None:
        self._digests = [
            (_digest(key.get_secret_value()), role)
            for role, keys in ((Role.USER, settings.api_keys), (Role.ADMIN, settings.admin_keys))
            for key in keys
        ]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def role_of(self, presented: str) -> Role:
        """The highest role of this key, in a time that does not depend on the keys."""
        digest = _digest(presented)
        role = Role.NOBODY
        for known, granted in self._digests:
            # No early exit: the time of the search would reveal where a key is.
            role = max(role, granted if hmac.compare_digest(known, digest) else Role.NOBODY)
        return role


class Guard:
    """ASGI middleware that lets a request through or answers 401 or 403."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keyring = Keyring(settings)
        self._local = is_loopback(settings.host)
        self._origins = frozenset(settings.cors_origins)
        self._public_host = _hostname(settings.public_url or "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer for it."""
        if scope["type"] == "http":
            failure = self._refusal(scope)
            if failure is not None:
                response = failure.response(scope["path"], scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Failure | None:
        """Why a request is refused. What its caller may do becomes `request.state.role`."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        admin = is_admin(method, path)
        scope["state"]["role"] = Role.NOBODY if self._keyring else Role.ADMIN
        if not self._keyring:
            return self._refusal_without_keys(headers, admin=admin)
        if is_open(method, path):
            return None
        presented = _presented_keys(headers)
        if not presented:
            return _unauthorized(
                "No API key given. Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
            )
        role = max(self._keyring.role_of(key) for key in presented)
        scope["state"]["role"] = role
        if role is Role.NOBODY:
            return _unauthorized("Incorrect API key.")
        if admin and role < Role.ADMIN:
            return _forbidden("This needs an admin key (server.admin_keys).", "admin_key_required")
        return None

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
    changes = method not in ("GET", "HEAD") and path != PLAN_PATH
    return changes and path.startswith(ADMIN_PREFIX)


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key at all, even with configured keys."""
    if path in PROBES:
        return True
    prefixes = (WEB_FILES_PREFIX, DOCS_FILES_PREFIX, IMAGE_FILES_PREFIX)
    return method in ("GET", "HEAD") and (
        path in (WEB_PATH, DOCS_PATH) or path.startswith(prefixes)
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _presented_keys(headers: Headers) -> list[str]:
    keys = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(key.strip())
    return [key for key in keys if key]


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _unauthorized(message: str) -> Failure:
    return Failure(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _forbidden(message: str, code: str) -> Failure:
    return Failure(403, message, code=code)
