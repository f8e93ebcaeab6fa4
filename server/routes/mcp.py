"""`POST /mcp`: the tools of the server for agents, by the Model Context Protocol."""

from __future__ import annotations

import asyncio
import logging
from importlib import import_module
from typing import TYPE_CHECKING

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from engine.errors import QueueTimeout
from server.errors import MCP_PATH
from server.router import Router
from server.settings import ServerSettings
from server.start import Start

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.outputs import Outputs
    from server.mcp.protocol import McpServer

logger = logging.getLogger(__name__)

START_WAIT_S = 20.0
"""How long a request waits for the start of the engine; clients give up after half a minute."""


class McpEndpoint:
    """The endpoint. The package `mcp` is imported on a thread when the first request comes."""

    def __init__(
        self, engine: Engine, outputs: Outputs, settings: ServerSettings, start: Start
    ) -> None:
        self._engine = engine
        self._outputs = outputs
        self._settings = settings
        self._start = start
        self._server: McpServer | None = None
        self._opening: asyncio.Task[McpServer] | None = None

    def router(self) -> Router:
        """`POST /mcp`; no route if the configuration says so."""
        router = Router("mcp")
        if not self._settings.mcp:
            return router

        @router.post(MCP_PATH)
        async def mcp() -> Response:
            return _McpResponse(self._server or await self._open())

        return router

    async def close(self) -> None:
        """End what still runs."""
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
        if self._server is not None:
            await self._server.close()

    async def _open(self) -> McpServer:
        await self._wait_started()
        if self._opening is None:
            self._opening = asyncio.create_task(self._import())
        try:
            return await asyncio.shield(self._opening)
        except ImportError as error:
            self._opening = None
            logger.error("the package mcp cannot be imported: %s", error)
            raise HTTPException(
                501, "This server lacks the package `mcp`. Install it: pip install mcp."
            ) from error

    async def _wait_started(self) -> None:
        """Wait for the engine: the import of a runtime hides packages that `mcp` needs.

        Raises:
            QueueTimeout: it takes too long.

        """
        try:
            async with asyncio.timeout(START_WAIT_S):
                await self._start.done.wait()
        except TimeoutError:
            raise QueueTimeout("The engine is still starting.", retry_after_s=5.0) from None

    async def _import(self) -> McpServer:
        protocol = await asyncio.to_thread(import_module, "server.mcp.protocol")
        server: McpServer = protocol.McpServer(self._engine, self._outputs, self._settings)
        await server.start()
        self._server = server
        return server


class _McpResponse(Response):
    """The answer of the protocol's own server."""

    def __init__(self, server: McpServer) -> None:
        super().__init__()
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await self._server.handle(scope, receive, send)
