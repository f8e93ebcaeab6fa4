"""Fetches the pictures that requests name by URL, from allowed hosts only.

A server that follows what clients name can be made to read its own network. So each address is
checked as it is connected to, and each redirect as if the client had named it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from engine.errors import InvalidRequest
from engine.units import format_size
from server.media import is_allowed
from server.settings import ServerSettings

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 3
AT_ONCE = 8
"""Pictures that are fetched at a time, of all requests. Further ones wait within their time."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"accept": "image/png, image/jpeg, image/webp, image/gif", "accept-encoding": "identity"}


class PictureFetcher:
    """One pool of connections. Nothing is opened before the first URL."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            InvalidRequest: naming `param`: it is not to be had, not allowed, or too large. The
                message names neither the URL, which may be a secret, nor an address.

        """
        try:
            async with asyncio.timeout(self._settings.media_timeout), self._turn:
                return await self._follow(url, param)
        except TimeoutError:
            limit = f"{self._settings.media_timeout:g} s (server.media_timeout)"
            raise _refused(param, f"{_host(url)} did not send it within {limit}") from None

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _follow(self, url: str, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(url, param)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
            if not is_allowed(url, self._settings.allowed_media_hosts):
                raise _refused(param, "its host redirects to one that is not allowed")
        raise _refused(param, f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: str, param: str) -> bytes | str:
        """The content, or where it is."""
        import httpcore
        import httpx

        from engine.runtimes.remote.transport import PrivateAddress

        host = _host(url)
        try:
            client = await self._opened()
            async with client.stream("GET", url, headers=_HEADERS) as response:
                location = response.headers.get("location")
                if response.status_code in _REDIRECTS and location:
                    return str(location)
                if response.status_code != httpx.codes.OK:
                    raise _refused(param, f"{host} answered {response.status_code}")
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise _refused(param, f"{host} sent it compressed once more")
                return await self._read(response, param)
        except (httpx.HTTPError, httpx.InvalidURL, httpcore.NetworkError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, PrivateAddress):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise _refused(
                    param,
                    f"{host} leads to a private address (server.private_media_hosts names the"
                    " hosts that may)",
                ) from None
            raise _refused(param, f"{host} cannot be reached") from None

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        most = self._settings.max_image_bytes
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > most:
                raise too_many_bytes(param, most)
        return bytes(content)

    async def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            from engine.runtimes.remote.transport import new_client

            private = frozenset(self._settings.private_media_hosts)
            client = await asyncio.to_thread(new_client, private.__contains__)
            if self._client is None:
                self._client = client
            else:
                await client.aclose()
        return self._client


def too_many_bytes(param: str, most: int) -> InvalidRequest:
    """The refusal of a picture that is too long."""
    return InvalidRequest(
        f"{param}: the picture has more than {format_size(most)} (server.max_image_bytes).",
        param=param,
    )


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _refused(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: the picture could not be fetched: {reason}.", param=param)
