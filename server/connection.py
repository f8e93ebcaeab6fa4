"""Work that lasts no longer than its client stays."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive


async def run_while_connected(work: Coroutine[None, None, None], receive: Receive) -> None:
    """Run `work`; if the client leaves first, cancel it once and wait until it has cleaned up.

    The request's body must have been read. Native cancellation is used rather than a cancel
    scope that cancels again at every await: what `work` does in its `finally` must complete.
    A server tells of a disconnect also when the response is complete, so `work` must give back
    what it holds before it sends the last piece.

    Raises:
        Exception: what `work` raised. A disconnect raises nothing.

    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait((task, watch))
    if not task.cancelled():
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
