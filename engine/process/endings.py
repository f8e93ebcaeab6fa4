"""Waiting for an end that must be seen, whoever loses patience."""

from __future__ import annotations

import asyncio
from typing import Any


async def wait_for_end(future: asyncio.Future[Any]) -> None:
    """Return once `future` has ended, however it does, and however often the caller is cancelled.

    Raises:
        asyncio.CancelledError: the caller was cancelled during the wait. The future has ended.

    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
