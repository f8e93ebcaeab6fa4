"""OpenAI's speech endpoint: audio, or events with audio in them, sent while it is made."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError, NotFound, RuntimeFailed
from engine.events import Frame, Speech, Word
from engine.media.audio_output import ENCODINGS, AudioEncoder
from engine.requests import Priority, SpeechRequest
from server.body import read_object
from server.connection import run_while_connected
from server.forms import Fields
from server.headers import answer_headers
from server.schemas.audio import NO_USAGE, SpeechBody, words_document
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import event_frame, stream_answer

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore
    from engine.session import Session

logger = logging.getLogger(__name__)


def speech_router(engine: Engine, voices: VoiceStore, settings: ServerSettings) -> APIRouter:
    """`POST /v1/audio/speech`."""
    router = APIRouter(tags=["audio"])

    def cloned(voice: str) -> Path | None:
        try:
            return voices.sample(voice)
        except NotFound:
            return None  # then it is a name, which the model knows or refuses

    @router.post("/v1/audio/speech", response_model=None)
    async def speech(request: Request) -> Response:
        fields = Fields(await read_object(request, settings.max_body_bytes), typed=True)
        scheduling = take_scheduling_options(request.headers, fields, default=Priority.INTERACTIVE)
        body = SpeechBody.of(fields)
        sample = None if body.voice is None else await asyncio.to_thread(cloned, body.voice)
        speech_request = body.to_request(
            sample, request_id=request.state.request_id, scheduling=scheduling
        )
        return SpeechResponse(engine, speech_request, body)

    return router


class SpeechResponse(Response):
    """The answer to one request: opened, sent and closed while the client stays.

    Whatever fails before the first sentence is encoded is raised and becomes an ordinary error
    response. Bare audio that fails later ends without its last chunk, so that the client sees
    that something is missing: it has no other place to tell.
    """

    def __init__(self, engine: Engine, request: SpeechRequest, body: SpeechBody) -> None:
        super().__init__()
        self._engine = engine
        self._request = request
        self._body_asked = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Run the request, giving it up when the client leaves."""
        await run_while_connected(self._answer(send), receive)

    async def _answer(self, send: Send) -> None:
        if self._body_asked.stream_format == "sse":
            await stream_answer(self._engine, self._request, self._frames, send)
            return
        session = await self._engine.open(self._request)
        try:
            complete = await self._send_audio(session, send)
        finally:
            await session.close()
        if complete:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_audio(self, session: Session, send: Send) -> bool:
        """Send all but the end of the response; False if the audio is not whole."""
        async with aclosing(self._encoded(session)) as pieces:
            first, _ = await anext(pieces)
            head = Response(
                headers={**answer_headers(session), "cache-control": "no-cache"},
                media_type=ENCODINGS[self._body_asked.response_format].media_type,
            )
            del head.headers["content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})
            await _send_piece(send, first)
            try:
                async for piece, _ in pieces:
                    await _send_piece(send, piece)
            except Exception as error:
                expected = isinstance(error, EngineError)
                request_id = self._request.request_id
                logger.error("speech %s failed: %s", request_id, error, exc_info=not expected)
                return False
        return True

    async def _frames(self, session: Session) -> AsyncGenerator[Frame, None]:
        async with aclosing(self._encoded(session)) as pieces:
            async for piece, words in pieces:
                if words:
                    yield event_frame(
                        {"type": "speech.audio.words", "words": words_document(words)}
                    )
                if piece:
                    audio = base64.b64encode(piece).decode()
                    yield event_frame({"type": "speech.audio.delta", "audio": audio})
        yield event_frame({"type": "speech.audio.done", "usage": NO_USAGE})

    async def _encoded(
        self, session: Session
    ) -> AsyncGenerator[tuple[bytes, tuple[Word, ...]], None]:
        """What can be sent after each piece of speech, maybe nothing, and the piece's words."""
        encoder = None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Speech):
                    if encoder is None:
                        audio_format = self._body_asked.response_format
                        encoder = AudioEncoder(audio_format, event.sample_rate)
                    yield await asyncio.to_thread(encoder.encode, event.samples), event.words
        if encoder is None:
            raise RuntimeFailed("The model gave no speech.")
        # The session ended with its events: the device is free while the rest is encoded.
        yield await asyncio.to_thread(encoder.finish), ()


async def _send_piece(send: Send, piece: bytes) -> None:
    if piece:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
