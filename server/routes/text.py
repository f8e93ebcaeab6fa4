"""The endpoints of language and embedding models: OpenAI's, Anthropic's and the tokenizer's."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from engine.errors import InvalidRequest
from engine.events import Frame
from engine.requests import TextOperation, TextRequest
from server.body import read_object
from server.connection import run_while_connected
from server.forms import Fields
from server.media import refuse_foreign_media
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import stream_answer

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

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

_STREAMING = frozenset(
    {
        TextOperation.CHAT,
        TextOperation.COMPLETION,
        TextOperation.RESPONSES,
        TextOperation.MESSAGES,
    }
)


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
    scheduling = take_scheduling_options(request.headers, Fields(body, typed=True))
    return TextRequest(
        model=model,
        operation=operation,
        body=body,
        request_id=request.state.request_id,
        scheduling=scheduling,
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
        request = self._request
        tells = request.operation in _STREAMING and request.body.get("stream") is True
        document = await stream_answer(self._engine, request, _frames, send, tells=tells)
        if document is not None:
            await document(scope, receive, send)


def _frames(session: Session) -> AsyncGenerator[Frame, None]:
    return session.frames()
