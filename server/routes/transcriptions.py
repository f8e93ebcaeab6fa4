"""OpenAI's transcriptions and translations: one document or text, or events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from engine.errors import RuntimeFailed
from engine.events import Frame, Heard, Segment
from engine.requests import Priority, TranscriptionRequest
from server.connection import run_while_connected
from server.forms import read_fields
from server.headers import answer_headers
from server.schemas.audio import (
    RecordingBody,
    TranscriptionBody,
    TranslationBody,
    transcript_text,
)
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import event_frame, stream_answer
from server.subtitles import srt, vtt

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

_PATHS: dict[str, type[RecordingBody]] = {
    "/v1/audio/transcriptions": TranscriptionBody,
    "/v1/audio/translations": TranslationBody,
}


def transcriptions_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    """`POST /v1/audio/transcriptions` and `/v1/audio/translations`, from forms."""
    router = APIRouter(tags=["audio"])

    def add(path: str, kind: type[RecordingBody]) -> None:
        async def endpoint(request: Request) -> Response:
            fields = await read_fields(request, settings.max_body_bytes)
            scheduling = take_scheduling_options(
                request.headers, fields, default=Priority.INTERACTIVE
            )
            body = kind.of(fields)
            transcription_request = body.to_request(
                request_id=request.state.request_id, scheduling=scheduling
            )
            return TranscriptionResponse(engine, transcription_request, body)

        router.add_api_route(
            path, endpoint, methods=["POST"], name=kind.operation.value, response_model=None
        )

    for path, kind in _PATHS.items():
        add(path, kind)
    return router


class TranscriptionResponse(Response):
    """The answer to one request: opened, sent and closed while the client stays.

    Whatever fails before the first byte is raised and becomes an ordinary error response.
    """

    def __init__(self, engine: Engine, request: TranscriptionRequest, body: RecordingBody) -> None:
        super().__init__()
        self._engine = engine
        self._request = request
        self._body_asked = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, giving it up when the client leaves."""
        await run_while_connected(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._body_asked.streams:
            await stream_answer(self._engine, self._request, _deltas, send)
        else:
            await self._send_whole(scope, receive, send)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await self._engine.open(self._request)
        began_s = time.perf_counter()
        heard, segments = None, []
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Heard):
                    heard = event
                elif isinstance(event, Segment):
                    segments.append(event)
        if heard is None:
            raise RuntimeFailed("The model gave no transcript.")
        ran_ms = (time.perf_counter() - began_s) * 1e3
        response = self._rendered(heard, segments)
        response.headers.update(answer_headers(session, ran_ms))
        await response(scope, receive, send)

    def _rendered(self, heard: Heard, segments: list[Segment]) -> Response:
        body = self._body_asked
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
    """Each segment's text as soon as it is known, then the whole, which is all of them."""
    text = ""
    async with aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, Segment):
                delta = event.text if text else event.text.lstrip()
                if delta:
                    text += delta
                    yield event_frame({"type": "transcript.text.delta", "delta": delta})
    yield event_frame({"type": "transcript.text.done", "text": text})
