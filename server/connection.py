"""Responses whose work ends when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ConnectedResponse(Response):
    """The response that a coroutine sends or returns, while the client stays.

    Every error before the first byte is raised and becomes an ordinary error response.
    """

    def __init__(self, answer: Callable[[Send], Awaitable[Response | None]]) -> None:
        """`answer` sends the response itself, or returns one that is then sent."""
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. If the client leaves, give it up."""

        async def work() -> None:
            response = await self._answer(send)
            if response is not None:
                await response(scope, receive, send)

        await run_while_connected(work(), receive)


async def run_while_connected(work: Coroutine[None, None, None], receive: Receive) -> None:
    """Run `work`. If the client leaves first, cancel it once and wait until it has cleaned up.

    The request's body must have been read. A cancel scope would cancel again at every await, so
    this uses native cancellation: the `finally` blocks of `work` must complete. A server reports a
    disconnect also when the response is complete. So `work` must release what it holds before it
    sends the last piece.

    Raises:
        Exception: the error that `work` raised. A disconnect raises nothing.

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
