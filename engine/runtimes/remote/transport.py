"""Connections to providers, to no private address that the configuration does not allow.

The check is in the network backend: it looks at the very address that is then connected to, so a
name that is rebound in between gains nothing. TLS still checks the name.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from engine.runtimes.remote.address import is_named_literally, is_private

KEEP_ALIVE_S = 30.0
"""How long an idle connection is kept. Many servers close theirs after a minute."""


class PrivateAddress(httpcore.ConnectError):
    """A host name leads to a private address."""


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves names itself, and connects to addresses that are allowed."""

    def __init__(
        self, backend: httpcore.AsyncNetworkBackend, may_be_private: Callable[[str], bool]
    ) -> None:
        self._backend = backend
        self._may_be_private = may_be_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as in the base class
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of the host that answers."""
        if is_named_literally(host):
            return await self._backend.connect_tcp(
                host, port, timeout, local_address, socket_options
            )
        addresses = await _resolve(host, port, timeout)
        allowed = self._may_be_private(host)
        for address in addresses:
            if is_private(address) and not allowed:
                raise PrivateAddress(
                    f"{host} leads to the private address {address}; the option 'private' allows it"
                )
        error: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._backend.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        raise error

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        """Refuse: no provider is a file."""
        raise httpcore.ConnectError("a provider is reached by TCP")

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)


async def _resolve(host: str, port: int, limit_s: float | None) -> list[str]:
    try:
        async with asyncio.timeout(limit_s):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
    except TimeoutError:
        raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from None
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def new_client(may_be_private: Callable[[str], bool]) -> httpx.AsyncClient:
    """A pool of connections of its own: HTTP/1.1, kept alive, and no redirect is followed.

    Reading the certificates takes some 20 ms, so this is work for a thread.
    """
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S
    )
    context = _tls()
    direct = _direct(context, limits, may_be_private)
    mounts = {
        f"{scheme}://": _Proxied(direct, httpx.AsyncHTTPTransport(context, proxy=url))
        for scheme, url in getproxies().items()
        if scheme in ("http", "https")
    }
    return httpx.AsyncClient(
        transport=direct,
        mounts=mounts,
        timeout=None,
        follow_redirects=False,
        trust_env=False,
        headers={"user-agent": "roundhouse"},
    )


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _direct(
    context: ssl.SSLContext, limits: httpx.Limits, may_be_private: Callable[[str], bool]
) -> httpx.AsyncHTTPTransport:
    transport = httpx.AsyncHTTPTransport(context, limits=limits, trust_env=False)
    # httpx hands no network backend on, and a transport of our own would be a copy of all of it.
    pool: Any = transport._pool
    pool._network_backend = GuardedBackend(pool._network_backend, may_be_private)
    return transport


class _Proxied(httpx.AsyncBaseTransport):
    """Through the proxy of the environment, but for the hosts that `NO_PROXY` names.

    The proxy resolves the names then, and decides where they may lead. What is named literally is
    reached directly, as it may mean this machine.
    """

    def __init__(self, direct: httpx.AsyncBaseTransport, proxied: httpx.AsyncBaseTransport) -> None:
        self._direct = direct
        self._proxied = proxied

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        straight = is_named_literally(host) or bool(proxy_bypass(host))
        chosen = self._direct if straight else self._proxied
        return await chosen.handle_async_request(request)

    async def aclose(self) -> None:
        await self._proxied.aclose()
