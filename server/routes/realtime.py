"""OpenAI's realtime protocol over WebSockets: voice in, voice out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import QueryParams

from engine.errors import InvalidRequest
from server.keys.access import EVERYTHING
from server.realtime.session import Conversing
from server.router import Router
from server.websocket.connection import WebSocketConnection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore


HANDSHAKE_S = 5.0
"""Seconds for the models, before the connection is accepted without them. Clients built upon the
library `websockets`, and OpenAI's is, give up a handshake after ten."""


def realtime_router(engine: Engine, voices: VoiceStore) -> Router:
    """`/v1/realtime`, a WebSocket."""
    router = Router("realtime")

    @router.websocket("/v1/realtime")
    async def realtime(connection: WebSocketConnection) -> None:
        model, transcribes_only = _asked(connection.query)
        session = Conversing(
            engine,
            getattr(connection.state, "access", EVERYTHING),
            connection.send,
            request_id=connection.state.request_id,
            find_voice=voices.find_sample,
            default_model=model,
            transcribes_only=transcribes_only,
        )
        beginning = asyncio.ensure_future(session.begin())
        try:
            # Before the connection is accepted, so that a lack of room has a status of its own.
            await asyncio.wait((beginning,), timeout=HANDSHAKE_S)
            if beginning.done():
                beginning.result()
            await connection.accept()
            await beginning
            await session.run(connection.receive)
        finally:
            if not beginning.done():
                beginning.cancel()
                await asyncio.wait((beginning,))
            await session.end()

    return router


def _asked(query: QueryParams) -> tuple[str | None, bool]:
    """The model that the query names, and whether the session only transcribes.

    Raises:
        InvalidRequest: naming the wrong parameter.

    """
    for name in query:
        if name not in ("model", "intent"):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        if len(query.getlist(name)) > 1:
            raise InvalidRequest("It is given more than once.", param=name)
    model, intent = query.get("model"), query.get("intent")
    if intent not in (None, "transcription"):
        raise InvalidRequest("It is transcription, or left out.", param="intent")
    if model is None and intent is None:
        raise InvalidRequest("You must name a model, as in /v1/realtime?model=…", param="model")
    return model, intent == "transcription"
