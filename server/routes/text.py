"""The endpoints of text: OpenAI's, Anthropic's, Cohere's rerank, and vLLM's own."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response

from engine.events import Event
from engine.requests import TextOperation, TextRequest
from server.answer import stream_answer
from server.connection import ConnectedResponse
from server.forms import Fields, read_json
from server.keys.access import access_of
from server.media import check_media_urls
from server.response_cache.cache import ResponseCache, cached
from server.router import Router
from server.schemas.fields import model_name
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session
    from server.pictures import Pictures

RESPONSES_PATH = "/v1/responses"
"""Answered by `responses_router`, which keeps what it answers."""

TEXT_PATHS = {
    "/v1/chat/completions": TextOperation.CHAT,
    "/v1/completions": TextOperation.COMPLETION,
    RESPONSES_PATH: TextOperation.RESPONSES,
    "/v1/messages": TextOperation.MESSAGES,
    "/v1/messages/count_tokens": TextOperation.COUNT_TOKENS,
    "/v1/embeddings": TextOperation.EMBEDDINGS,
    "/rerank": TextOperation.RERANK,
    "/v1/rerank": TextOperation.RERANK,
    "/v2/rerank": TextOperation.RERANK,
    "/score": TextOperation.SCORE,
    "/v1/score": TextOperation.SCORE,
    "/classify": TextOperation.CLASSIFY,
    "/v1/classify": TextOperation.CLASSIFY,
    "/v1/moderations": TextOperation.MODERATION,
    "/v1/fill-mask": TextOperation.FILL_MASK,
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


def text_router(
    engine: Engine,
    settings: ServerSettings,
    pictures: Pictures,
    cache: ResponseCache | None = None,
) -> Router:
    """All routes that take a JSON object with a `model` and answer a document or a stream."""
    router = Router("text")
    moderating = (model.id for model in engine.config.models if model.task == "classify")
    defaults = {TextOperation.MODERATION: next(moderating, None)}

    def add(path: str, operation: TextOperation) -> None:
        async def endpoint(request: Request) -> Response:
            fields, text_request = await read_text_request(
                request, operation, settings, defaults.get(operation)
            )
            await pictures.settle(text_request)
            streams = operation in _STREAMING and text_request.body.get("stream") is True
            answer = partial(stream_answer, engine, text_request, events_of, shows_wait=streams)
            return ConnectedResponse(cached(cache, request, fields, text_request, answer))

        router.add(path, endpoint, ["POST"], name=operation.value)

    for path, operation in TEXT_PATHS.items():
        if path != RESPONSES_PATH:
            add(path, operation)
    return router


async def read_text_request(
    request: Request,
    operation: TextOperation,
    settings: ServerSettings,
    default_model: str | None = None,
) -> tuple[Fields, TextRequest]:
    """The fields of the body, and the engine's request from them and the headers.

    `default_model` serves requests that name none.

    Raises:
        InvalidRequest: naming the wrong field or header.
        ModelForbidden: the key may not use the model.

    """
    fields = await read_json(request, settings.max_body_bytes)
    model = fields.values.get("model")
    if model is None and default_model is not None:
        model = default_model
        access_of(request).check_model(model)  # of a model in the body, the options see to it
    model = model_name(model)
    check_media_urls(fields.values, settings.allowed_media_hosts)
    scheduling = take_scheduling_options(request, fields)
    return fields, TextRequest(
        model=model,
        operation=operation,
        body=fields.values,
        request_id=request.state.request_id,
        scheduling=scheduling,
    )


def events_of(session: Session) -> AsyncGenerator[Event, None]:
    """The answer of a text model: its events as they are."""
    return session.events()
