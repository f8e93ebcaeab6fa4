"""The endpoints of language and embedding models: OpenAI's, Anthropic's and the tokenizer's."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError, InvalidRequest
from engine.requests import Document, TextOperation, TextRequest
from server.body import read_object
from server.connection import run_while_connected
from server.errors import Failure
from server.headers import read_priority, read_timeout_s, timing_headers
from server.media import refuse_foreign_media
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine, Session

logger = logging.getLogger(__name__)

_PATHS = {
    "/v1/chat/completions": TextOperation.CHAT,
    "/v1/completions": TextOperation.COMPLETION,
    "/v1/responses": TextOperation.RESPONSES,
    "/v1/messages": TextOperation.MESSAGES,
    "/v1/messages/count_tokens": TextOperation.COUNT_TOKENS,
    "/v1/embeddings": TextOperation.EMBEDDINGS,
    "/tokenize": TextOperation.TOKENIZE,
    "/v1/tokenize": TextOperation.TOKENIZE,
    "/detokenize": TextOperation.DETOKENIZE,
    "/v1/detokenize": TextOperation.DETOKENIZE,
}


def text_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    """All routes that take a JSON object with a `model` and answer a document or a stream."""
    router = APIRouter(tags=["text"])

    def add(path: str, operation: TextOperation) -> None:
        async def endpoint(request: Request) -> Response:
            return TextResponse(engine, await read_text_request(request, operation, settings))

        router.add_api_route(
            path, endpoint, methods=["POST"], name=operation.value, response_model=None
        )

    for path, operation in _PATHS.items():
        add(path, operation)
    return router


async def read_text_request(
    request: Request, operation: TextOperation, settings: ServerSettings
) -> TextRequest:
    """Body and headers as the engine's request.

    Raises:
        InvalidRequest: naming the field or header at fault.

    """
    body = await read_object(request, settings.max_body_bytes)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("You must name a model, as a string.", param="model")
    refuse_foreign_media(body, settings.allowed_media_hosts)
    return TextRequest(
        model=model,
        operation=operation,
        body=body,
        request_id=request.state.request_id,
        priority=read_priority(request.headers),
        queue_timeout_s=read_timeout_s(request.headers),
    )


class TextResponse(Response):
    """The answer to one request: opened, sent and closed while the client stays.

    Whatever fails before the first byte is raised and becomes an ordinary error response.
    """

    def __init__(self, engine: Engine, request: TextRequest) -> None:
        super().__init__()
        self._engine = engine
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, giving it up when the client leaves."""
        await run_while_connected(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await self._engine.open(self._request)
        # The session is closed before the last piece is sent: see run_while_connected.
        try:
            headers = timing_headers(session.timings)
            first = session.first
            if not isinstance(first, Document):
                await self._stream(session, headers, send)
        finally:
            await session.close()
        if isinstance(first, Document):
            document = Response(first.body, headers=headers, media_type="application/json")
            await document(scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, session: Session, headers: dict[str, str], send: Send) -> None:
        head = Response(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})
        try:
            async with aclosing(session.frames()) as frames:
                async for frame in frames:
                    await _send_text(send, frame.data)
        except Exception as error:
            # The status is sent already: the stream itself must tell.
            request = self._request
            expected = isinstance(error, EngineError)
            logger.error("stream %s failed: %s", request.request_id, error, exc_info=not expected)
            frame_text = Failure.of(error).frame(request.operation, request.request_id)
            await _send_text(send, frame_text)


async def _send_text(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
