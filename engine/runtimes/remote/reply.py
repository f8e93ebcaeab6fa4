"""The body of an answer, as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from engine.runtimes.remote.failures import Failure, garbage, of_error, of_timeout
from engine.units import format_size

LEAST_END_S = 1.0
"""How long the end of a body may take once its reader has all that it wanted."""


class Reply:
    """The response of a provider, of which the head is here."""

    def __init__(self, response: httpx.Response, provider: str, most_bytes: int) -> None:
        self.provider = provider
        self.headers = response.headers
        self.most_bytes = most_bytes
        self.idle_s: float | None = None
        """How long the body may pause; None: as long as it likes."""
        self._response = response
        self._chunks: AsyncGenerator[bytes, None] | None = None

    @property
    def media_type(self) -> str:
        """What the body is."""
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()

    async def next(self) -> bytes | None:
        """The next piece of the body; None at its end.

        Raises:
            Failure: it breaks off, or pauses for too long.

        """
        if self._chunks is None:
            # Only the annotation of httpx hides that it is a generator.
            self._chunks = self._response.aiter_bytes()  # type: ignore[assignment]
        assert self._chunks is not None
        try:
            async with asyncio.timeout(self.idle_s):
                return await anext(self._chunks)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            if self.idle_s is None:
                raise
            raise of_timeout(self.provider, "sent nothing more", self.idle_s) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            if not isinstance(error, httpx.HTTPError):
                error = httpx.ReadError(str(error))
            raise of_error(self.provider, error, begun=True) from error

    async def whole(self, most_bytes: int | None = None) -> bytes:
        """The whole body.

        Raises:
            Failure: it breaks off, or is too long.

        """
        most_bytes = self.most_bytes if most_bytes is None else most_bytes
        body = bytearray()
        while (chunk := await self.next()) is not None:
            body += chunk
            if len(body) > most_bytes:
                raise Failure(
                    garbage(self.provider, f"more than {format_size(most_bytes)} in an answer")
                )
        return bytes(body)

    async def document(self) -> dict[str, Any]:
        """The whole body as a JSON object.

        Raises:
            Failure: it breaks off, or is too long.
            ProviderFailed: it is no JSON object.

        """
        body = await self.whole()
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise garbage(self.provider, "an answer that is not JSON") from None
        if not isinstance(document, dict):
            raise garbage(self.provider, "an answer that is no JSON object")
        return document

    async def beginning(self, most_bytes: int) -> bytes:
        """What comes first of the body, for the message of an error. Raises nothing of its own."""
        body = bytearray()
        try:
            while len(body) < most_bytes and (chunk := await self.next()) is not None:
                body += chunk
        except Failure:
            pass
        return bytes(body[:most_bytes])

    async def finish(self) -> None:
        """Read the end of a body that should have none, so that its connection can be kept."""
        self.idle_s = LEAST_END_S
        with contextlib.suppress(Failure):
            await self.next()

    async def close(self) -> None:
        """Give the connection back, or close it if the body is not at its end."""
        await self._response.aclose()
        if self._chunks is not None:
            await self._chunks.aclose()
