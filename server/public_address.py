"""The address by which clients reach the server, also behind a reverse proxy."""

from __future__ import annotations

import ipaddress
import re

from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import ANY, ServerSettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~%-]+)+")


def base_url(request: Request, settings: ServerSettings) -> str:
    """What links in an answer begin with, without a slash at the end.

    It is `server.public_url`. Otherwise it is the address that the request was sent to, as the
    headers of a trusted proxy say, and `server.root_path`.
    """
    if settings.public_url is not None:
        return settings.public_url
    scheme, host, prefix = request.base_url.scheme, request.base_url.netloc, settings.root_path
    client = request.client.host if request.client else ""
    if is_trusted(client, settings.forwarded_allow_ips):
        proto = _first(request, "x-forwarded-proto").lower()
        scheme = proto if proto in ("http", "https") else scheme
        named = _first(request, "x-forwarded-host")
        host = named if _HOST.fullmatch(named) else host
        removed = _first(request, "x-forwarded-prefix").rstrip("/")
        prefix = removed if _PREFIX.fullmatch(removed) else prefix
    return f"{scheme}://{host}{prefix}"


def is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    """Whether the address of a connection is one of `server.forwarded_allow_ips`."""
    if ANY in networks:
        return True
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket, or a client of a test
        return False
    # A listener for IPv6 shows an IPv4 client as ::ffff:10.0.0.1.
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip in ipaddress.ip_network(network, strict=False) for network in networks)


def without_root_path(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The application for a proxy that leaves `server.root_path` in the path.

    One that removes it sends the paths that the routes have, and they pass unchanged.
    """
    root = settings.root_path
    if not root:
        return app

    async def shortened(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == root:
            # The links of the page are relative to the slash.
            await RedirectResponse(f"{root}/", 308)(scope, receive, send)
            return
        if scope["type"] != "lifespan" and scope["path"].startswith(f"{root}/"):
            raw = scope.get("raw_path") or scope["path"].encode()
            scope = {
                **scope,
                "path": scope["path"].removeprefix(root),
                "raw_path": raw.removeprefix(root.encode()),
            }
        await app(scope, receive, send)

    return shortened


def _first(request: Request, header: str) -> str:
    """The value that the proxy nearest to the client wrote; each one may add its own."""
    return request.headers.get(header, "").partition(",")[0].strip()
