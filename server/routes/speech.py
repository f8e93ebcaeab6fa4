"""OpenAI's speech endpoint: audio, or events with audio, sent while the model makes it."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from starlette.types import Send

from engine.errors import EngineError, InvalidRequest
from engine.events import Frame
from engine.media.audio_output import ENCODINGS, AudioFormat
from engine.requests import Priority, SpeechRequest
from server.answer import stream_answer
from server.connection import ConnectedResponse
from server.encoded_speech import encoded_speech
from server.forms import read_json
from server.headers import answer_headers
from server.keys.access import EVERYTHING
from server.realtime.speech_stream import SpeechStream
from server.response_cache.cache import Answer, ResponseCache, cached
from server.router import Router
from server.schemas.audio import NO_USAGE, SpeechBody, words_document
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import BodyStream, event_frame
from server.websocket.connection import WebSocketConnection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore
    from engine.session import Session

logger = logging.getLogger(__name__)


def speech_router(
    engine: Engine,
    voices: VoiceStore,
    settings: ServerSettings,
    cache: ResponseCache | None = None,
) -> Router:
    """`POST /v1/audio/speech`, and the WebSocket below it that takes text while it is written."""
    router = Router("audio")

    @router.post("/v1/audio/speech")
    async def speech(request: Request) -> Response:
        fields = await read_json(request, settings.max_body_bytes)
        scheduling = take_scheduling_options(request, fields, default=Priority.INTERACTIVE)
        body = SpeechBody.of(fields)
        sample = None
        if body.voice is not None:
            sample = await asyncio.to_thread(voices.find_sample, body.voice)
        speech_request = body.to_request(
            sample, request_id=request.state.request_id, scheduling=scheduling
        )
        audio_format = body.response_format
        if body.stream_format == "sse":
            frames = partial(_frames, audio_format)
            answer: Answer = partial(stream_answer, engine, speech_request, frames)
        else:
            answer = partial(_send_audio, engine, speech_request, audio_format)
        return ConnectedResponse(cached(cache, request, fields, speech_request, answer))

    @router.websocket("/v1/audio/speech/stream")
    async def speech_stream(connection: WebSocketConnection) -> None:
        for name in connection.query:
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        stream = SpeechStream(
            engine,
            getattr(connection.state, "access", EVERYTHING),
            connection,
            request_id=connection.state.request_id,
            find_voice=voices.find_sample,
        )
        await connection.accept()
        await stream.run()

    return router


async def _send_audio(
    engine: Engine, request: SpeechRequest, audio_format: AudioFormat, send: Send
) -> None:
    """Send bare audio while the model makes it.

    An error after the first sentence ends the response without its last chunk. So the client sees
    that something is missing: bare audio has no other place for an error.

    Raises:
        Exception: an error before the first sentence was encoded.

    """
    stream = BodyStream(send, ENCODINGS[audio_format].media_type)
    session = await engine.open(request)
    try:
        complete = await _send_pieces(session, audio_format, stream, request.request_id)
    finally:
        await session.close()
    if complete:
        await stream.end()


async def _send_pieces(
    session: Session, audio_format: AudioFormat, stream: BodyStream, request_id: str
) -> bool:
    """Send all but the end of the response; False if the audio is not complete."""
    async with aclosing(encoded_speech(audio_format, session)) as pieces:
        first = await anext(pieces)
        await stream.begin(answer_headers(session))
        await stream.send_bytes(first.data)
        try:
            async for piece in pieces:
                await stream.send_bytes(piece.data)
        except Exception as error:
            expected = isinstance(error, EngineError)
            logger.error("speech %s failed: %s", request_id, error, exc_info=not expected)
            return False
    return True


async def _frames(audio_format: AudioFormat, session: Session) -> AsyncGenerator[Frame, None]:
    async with aclosing(encoded_speech(audio_format, session)) as pieces:
        async for piece in pieces:
            if piece.words:
                words = words_document(piece.words)
                yield event_frame({"type": "speech.audio.words", "words": words})
            if piece.data:
                audio = base64.b64encode(piece.data).decode()
                yield event_frame({"type": "speech.audio.delta", "audio": audio})
    yield event_frame({"type": "speech.audio.done", "usage": NO_USAGE})
