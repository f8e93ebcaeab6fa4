"""OpenAI's transcriptions and translations: one document or text, or events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from engine.errors import RuntimeFailed
from engine.events import Event, Frame, Heard, Segment
from engine.requests import Priority
from server.answer import stream_answer, whole_answer
from server.connection import ConnectedResponse
from server.forms import read_fields
from server.response_cache.cache import Answer, ResponseCache, cached
from server.router import Router
from server.schemas.audio import (
    RecordingBody,
    TranscriptionBody,
    TranslationBody,
    transcript_text,
)
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import event_frame
from server.subtitles import srt, vtt

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

_PATHS: dict[str, type[RecordingBody]] = {
    "/v1/audio/transcriptions": TranscriptionBody,
    "/v1/audio/translations": TranslationBody,
}


def transcriptions_router(
    engine: Engine, settings: ServerSettings, cache: ResponseCache | None = None
) -> Router:
    """`POST /v1/audio/transcriptions` and `/v1/audio/translations`, from forms."""
    router = Router("audio")

    def add(path: str, kind: type[RecordingBody]) -> None:
        async def endpoint(request: Request) -> Response:
            fields = await read_fields(request, settings.max_body_bytes)
            scheduling = take_scheduling_options(request, fields, default=Priority.INTERACTIVE)
            body = kind.of(fields)
            transcription_request = body.to_request(
                request_id=request.state.request_id, scheduling=scheduling
            )
            if body.streams:
                send: Answer = partial(stream_answer, engine, transcription_request, _deltas)
            else:
                render = partial(_render, body)
                send = lambda _: whole_answer(engine, transcription_request, render)  # noqa: E731
            return ConnectedResponse(cached(cache, request, fields, transcription_request, send))

        router.add(path, endpoint, ["POST"], name=kind.operation.value)

    for path, kind in _PATHS.items():
        add(path, kind)
    return router


async def _render(body: RecordingBody, events: Sequence[Event]) -> Response:
    """The transcript in the requested format.

    Raises:
        RuntimeFailed: the model gave no transcript.

    """
    heard = next((event for event in reversed(events) if isinstance(event, Heard)), None)
    segments = [event for event in events if isinstance(event, Segment)]
    if heard is None:
        raise RuntimeFailed("The model gave no transcript.")
    match body.response_format:
        case "json":
            return JSONResponse(body.document(heard, segments))
        case "verbose_json":
            return JSONResponse(body.verbose_document(heard, segments))
        case "text":
            return PlainTextResponse(f"{transcript_text(segments)}\n")
        case "srt":
            return PlainTextResponse(srt(segments))
        case "vtt":
            return PlainTextResponse(vtt(segments), media_type="text/vtt")


async def _deltas(session: Session) -> AsyncGenerator[Frame, None]:
    """The text of each segment as soon as it is known, then the whole text."""
    text = ""
    async with aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, Segment):
                delta = event.text if text else event.text.lstrip()
                if delta:
                    text += delta
                    yield event_frame({"type": "transcript.text.delta", "delta": delta})
    yield event_frame({"type": "transcript.text.done", "text": text})
