"""Tells a URL of the configuration that a budget is nearly spent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Messages that may wait; beyond, new ones are dropped."""
TIMEOUT_S = 10.0
DELAYS_S = (1.0, 10.0, 60.0)
"""The waits before further attempts."""
END_S = 2.0
"""How long the end of the server waits for messages."""


class Webhook:
    """Posts messages in the background, one after another. Lives on one event loop.

    Redirects are not followed: a message goes to the configured URL only. The URL may be a secret,
    so the log has its host only.
    """

    def __init__(self, delays_s: Sequence[float] = DELAYS_S) -> None:
        self._delays_s = delays_s
        self._waiting: asyncio.Queue[tuple[str, Mapping[str, Any]]] = asyncio.Queue(MOST_WAITING)
        self._task: asyncio.Task[None] | None = None

    def post(self, url: str, document: Mapping[str, Any]) -> None:
        """Send a document some time. Never waits, and never fails."""
        try:
            self._waiting.put_nowait((url, document))
        except asyncio.QueueFull:
            log.warning("a message for the webhook at %s is dropped", _host(url))
            return
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Send what waits, for a moment, and end."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(END_S):
                await self._waiting.join()
        except TimeoutError:
            log.warning("%d messages for webhooks are lost", self._waiting.qsize() + 1)
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._task = None

    async def _run(self) -> None:
        # Its log has whole URLs.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False) as client:
            while True:
                url, document = await self._waiting.get()
                try:
                    await self._send(client, url, document)
                finally:
                    self._waiting.task_done()

    async def _send(self, client: httpx.AsyncClient, url: str, document: Mapping[str, Any]) -> None:
        for delay_s in (*self._delays_s, None):
            try:
                answer = await client.post(url, json=document)
                if answer.is_success:
                    return
                reason = f"it answers {answer.status_code}"
                if answer.status_code < 500 and answer.status_code != 429:
                    delay_s = None  # another attempt would get the same answer
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                reason = type(error).__name__  # its text may have the URL
            if delay_s is None:
                log.warning("the webhook at %s was not told: %s", _host(url), reason)
                return
            await asyncio.sleep(delay_s)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "an unknown host"
    except ValueError:
        return "an unknown host"
