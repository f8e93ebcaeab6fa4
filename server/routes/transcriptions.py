"""OpenAI's transcriptions and translations: one document or text, or events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import Send

from engine.errors import RuntimeFailed
from engine.events import Event, Frame, Heard, Segment
from engine.files.source import Source
from engine.requests import DiarizationRequest, Priority, TranscriptionRequest
from engine.spoken_transcript import SpokenTranscript
from server.answer import stream_answer, whole_answer
from server.connection import ConnectedResponse
from server.diarization import find_diarizer, known_speakers
from server.forms import read_fields
from server.headers import HeldModels
from server.keys.access import access_of
from server.response_cache.cache import Answer, ResponseCache, cached
from server.router import Router
from server.schemas.audio import (
    RecordingBody,
    TranscriptionBody,
    TranslationBody,
    diarized_document,
    spoken_documents,
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
            if isinstance(body, TranscriptionBody) and body.diarizes:
                diarizer = find_diarizer(engine.config, access_of(request))
                known = await asyncio.to_thread(
                    known_speakers, body.known_speaker_names, body.known_speaker_references
                )
                diarization = DiarizationRequest(
                    model=diarizer.id,
                    audio=body.file,
                    request_id=f"{request.state.request_id}-speakers",
                    known_speakers=known,
                    scheduling=scheduling,
                )
                send: Answer = partial(
                    _diarized, engine, transcription_request, diarization, streams=body.streams
                )
            elif body.streams:
                send = partial(stream_answer, engine, transcription_request, _deltas)
            else:
                render = partial(_render, body)
                send = lambda _: whole_answer(engine, transcription_request, render)  # noqa: E731
            # A kept answer with speakers would have to know the files of both models.
            answer = cached(
                cache, request, fields, transcription_request, send, keeps=not body.diarizes
            )
            return ConnectedResponse(answer)

        router.add(path, endpoint, ["POST"], name=kind.operation.value)

    for path, kind in _PATHS.items():
        add(path, kind)
    return router


async def _diarized(
    engine: Engine,
    request: TranscriptionRequest,
    diarization: DiarizationRequest,
    send: Send,
    *,
    streams: bool,
) -> Response | None:
    """Who said what, as a document or as events.

    Raises:
        EngineError: what goes wrong before the answer begins.

    """
    transcript = await SpokenTranscript.begin(engine, request, diarization)
    try:
        diarizer = engine.config.find(diarization.model)
        held = HeldModels(transcript.waited, Source(diarizer.source).random_weights)
        if streams:
            frames = partial(_spoken_deltas, transcript)
            return await stream_answer(engine, transcript.request, frames, send, held=held)
        render = partial(_render_spoken, transcript)
        return await whole_answer(engine, transcript.request, render, held=held)
    finally:
        await transcript.end()


async def _render_spoken(transcript: SpokenTranscript, events: Sequence[Event]) -> Response:
    heard, segments = _heard(events)
    return JSONResponse(diarized_document(heard, segments, await transcript.join(segments)))


async def _spoken_deltas(
    transcript: SpokenTranscript, session: Session
) -> AsyncGenerator[Frame, None]:
    """The text as it becomes known. When all is heard, who said what, then the whole text."""
    segments: list[Segment] = []
    async with aclosing(_text_deltas(session, segments)) as frames:
        async for frame in frames:
            yield frame
    for document in spoken_documents(await transcript.join(segments)):
        yield event_frame(document)
    yield _done(segments)


async def _render(body: RecordingBody, events: Sequence[Event]) -> Response:
    """The transcript in the requested format.

    Raises:
        RuntimeFailed: the model gave no transcript.

    """
    heard, segments = _heard(events)
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
        case "diarized_json":
            raise AssertionError("it is answered with the turns of speakers")


def _heard(events: Sequence[Event]) -> tuple[Heard, list[Segment]]:
    heard = next((event for event in reversed(events) if isinstance(event, Heard)), None)
    if heard is None:
        raise RuntimeFailed("The model gave no transcript.")
    return heard, [event for event in events if isinstance(event, Segment)]


async def _deltas(session: Session) -> AsyncGenerator[Frame, None]:
    """The text of each segment as soon as it is known, then the whole text."""
    segments: list[Segment] = []
    async with aclosing(_text_deltas(session, segments)) as frames:
        async for frame in frames:
            yield frame
    yield _done(segments)


async def _text_deltas(session: Session, segments: list[Segment]) -> AsyncGenerator[Frame, None]:
    """The text of each segment as soon as it is known; the segment goes to `segments`."""
    begun = False
    async with aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, Segment):
                segments.append(event)
                delta = event.text if begun else event.text.lstrip()
                if delta:
                    begun = True
                    yield event_frame({"type": "transcript.text.delta", "delta": delta})


def _done(segments: Sequence[Segment]) -> Frame:
    text = "".join(segment.text for segment in segments).lstrip()
    return event_frame({"type": "transcript.text.done", "text": text})
