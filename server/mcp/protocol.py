"""The MCP server behind `POST /mcp`, by the official package. Importing it takes a second."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any

from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    CancelledNotificationParams,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from engine.words import echoed
from server.auth import IMAGE_FILES_PREFIX
from server.keys.access import access_of
from server.mcp.images import IMAGE_TOOLS
from server.mcp.residency import RESIDENCY_TOOLS
from server.mcp.search import SEARCH_TOOLS
from server.mcp.sound import SOUND_TOOLS
from server.mcp.text import TEXT_TOOLS
from server.mcp.tool import Call, Tool, ToolFailure
from server.mcp.videos import VIDEO_TOOLS
from server.packages import installed_version
from server.public_address import base_url
from server.settings import ServerSettings

if TYPE_CHECKING:
    from mcp.server.context import ServerRequestContext

    from engine.engine import Engine
    from engine.media.outputs import Outputs

logger = logging.getLogger(__name__)

SESSION_HEADER = "mcp-session-id"
VERSION_HEADER = "mcp-protocol-version"

TOOLS: tuple[Tool, ...] = (
    *RESIDENCY_TOOLS,
    *IMAGE_TOOLS,
    *VIDEO_TOOLS,
    *SOUND_TOOLS,
    *TEXT_TOOLS,
    *SEARCH_TOOLS,
)

MAX_RESULT_CHARS = 2**20 - 2**12
"""Official clients take messages of 1 MiB by default; the rest is the envelope."""

INSTRUCTIONS = """\
Roundhouse runs models on one device and swaps them as needed. A tool whose model is not loaded \
waits for it, and reports its place in the queue. `list_models` says what there is, and \
`plan_model` what a model would cost now. Images and speech come with links to their files.\
"""


class McpServer:
    """The tools behind the protocol. It keeps nothing between requests but the calls that run."""

    def __init__(self, engine: Engine, outputs: Outputs, settings: ServerSettings) -> None:
        self._engine = engine
        self._outputs = outputs
        self._settings = settings
        self._tools = {tool.name: tool for tool in TOOLS}
        self._running: dict[tuple[str, str, str], asyncio.Task[Any]] = {}
        """Calls that a notification may cancel: by key, session and id of the request."""
        # The package logs two lines a request.
        logging.getLogger("mcp").setLevel(logging.WARNING)
        server: Server[Any] = Server(
            "roundhouse",
            title="Roundhouse",
            version=installed_version("roundhouse") or "",
            instructions=INSTRUCTIONS,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            # No tool has parameters in headers; otherwise each call would list all tools.
            get_tool_input_schema=lambda _name: None,
        )
        server.middleware.clear()  # it makes spans of its own; the server's are in server.tracing
        server.add_notification_handler(
            "notifications/cancelled", CancelledNotificationParams, self._on_cancelled
        )
        self._manager = StreamableHTTPSessionManager(
            app=server, stateless=True, max_request_body_size=settings.max_body_bytes
        )
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve."""
        ready = asyncio.Event()

        async def serve() -> None:
            async with self._manager.run():
                ready.set()
                await self._stop.wait()

        self._serving = asyncio.create_task(serve())
        await ready.wait()

    async def close(self) -> None:
        """End what still runs."""
        self._stop.set()
        if self._serving is not None:
            await asyncio.wait((self._serving,))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        A client of an older protocol gets a session's id. It is kept nowhere: it only tells apart
        whose calls a notification cancels.
        """
        headers = Headers(scope=scope)
        # Later protocols name their version with every request, the first of older ones does not.
        old = VERSION_HEADER not in headers and SESSION_HEADER not in headers

        async def with_session(message: Message) -> None:
            if message["type"] == "http.response.start" and old:
                MutableHeaders(scope=message)[SESSION_HEADER] = uuid.uuid4().hex
            await send(message)

        await self._manager.handle_request(scope, receive, with_session)

    async def _list_tools(
        self, context: ServerRequestContext[Any, Request], _params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        access = access_of(_request(context))
        tools = [
            tool.described(tool.models(self._engine, access))
            for tool in TOOLS
            if tool.refusal(self._engine, access) is None
        ]
        return ListToolsResult(tools=tools)

    async def _call_tool(
        self, context: ServerRequestContext[Any, Request], params: CallToolRequestParams
    ) -> CallToolResult:
        tool = self._tools.get(params.name)
        if tool is None:
            raise MCPError(INVALID_PARAMS, f"There is no tool {echoed(params.name)}.")
        task = asyncio.current_task()
        assert task is not None
        place = _place(context, context.request_id)
        if place is not None:
            self._running[place] = task
        try:
            return await self._run(tool, context, params.arguments or {})
        except ToolFailure as failure:
            return _error(str(failure))
        except asyncio.CancelledError:
            logger.info("the call of %s was cancelled", tool.name)
            raise
        except Exception:
            logger.exception("the tool %s failed unexpectedly", tool.name)
            return _error("The tool failed unexpectedly; the log of the server says why.")
        finally:
            if place is not None and self._running.get(place) is task:
                del self._running[place]

    async def _run(
        self, tool: Tool, context: ServerRequestContext[Any, Request], arguments: dict[str, Any]
    ) -> CallToolResult:
        request = _request(context)
        refusal = tool.refusal(self._engine, access_of(request))
        if refusal is not None:
            raise ToolFailure(refusal)
        _check_names(tool, arguments)
        base = base_url(request, self._settings)
        call = Call(
            tool=tool,
            arguments=arguments,
            request=request,
            engine=self._engine,
            outputs=self._outputs,
            files_url=f"{base}{IMAGE_FILES_PREFIX}",
            videos_url=f"{base}/v1/videos/",
            report=context.session.report_progress,
        )
        made = await tool.run(call)
        if len(made.model_dump_json(by_alias=True)) > MAX_RESULT_CHARS:
            raise ToolFailure(
                f"The result is too long for this protocol. Ask for less, or use {tool.path}."
            )
        return made

    async def _on_cancelled(
        self, context: ServerRequestContext[Any, Request], params: CancelledNotificationParams
    ) -> None:
        """A client of an older protocol gives up a call. Later ones close the connection."""
        place = _place(context, params.request_id)
        task = None if place is None else self._running.get(place)
        if task is not None:
            task.cancel()


def _request(context: ServerRequestContext[Any, Request]) -> Request:
    assert context.request is not None  # every transport here is HTTP
    return context.request


def _place(
    context: ServerRequestContext[Any, Request], request_id: object
) -> tuple[str, str, str] | None:
    """What tells one call from others; None without a session."""
    request = _request(context)
    session = request.headers.get(SESSION_HEADER)
    if session is None or request_id is None:
        return None
    # 1 and "1" are different ids.
    return access_of(request).caller.name, session, repr(request_id)


def _check_names(tool: Tool, arguments: dict[str, Any]) -> None:
    known = {*tool.properties, *(("model",) if tool.takes_model else ())}
    for name in arguments:
        if name not in known:
            words = f"It takes {', '.join(sorted(known))}." if known else "It takes none."
            raise ToolFailure(f"{tool.name} has no argument {echoed(name)}. {words}")
    for name in tool.required:
        if arguments.get(name) is None:
            raise ToolFailure(f"{tool.name} needs the argument {name}.")


def _error(text: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=text)], is_error=True)
